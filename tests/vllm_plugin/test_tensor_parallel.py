"""Two ranks, each with its own heads, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from engines import adding, ask, effect, params, require_equal, scaling, serving
from test_scheduling import batch
from tiny_llama import TinyLlama, save

import actscale_fast as af


def test_two_ranks_equal_transformers(tiny: TinyLlama, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    made = save(tiny, tmp_path / "o", torch.Generator().manual_seed(3), "SteerVec", site="attn_out")
    alpha = af.load_intervention(folder / "a").alpha.detach()[:, 0]
    asked = batch(folder, [12, 50])
    prompt = asked[0][0]
    outputs = [({"actscale": "o"}, None), ({"actscale": "a+o"}, scaling(alpha, 1.0))]
    with serving(tiny, tmp_path, tensor_parallel_size=2) as llm:
        results = ask(llm, [(prompt, params(**extra)) for prompt, extra, _ in asked])
        at_output = ask(llm, [(prompt, params(**extra)) for extra, _ in outputs])
        status = llm.collective_rpc("actscale_status")
    assert [one["heads"] for one in status] == [[0, 2], [2, 4]]
    for (prompt, _, edit), result in zip(asked, results, strict=True):
        require_equal(tiny, prompt, result, edit)
    add = adding(made.vectors.detach()[:, 0, 0], 1.0)  # once, not once for each rank
    for (_, edit), result in zip(outputs, at_output, strict=True):
        require_equal(tiny, asked[0][0], result, edit, add)
        assert effect(tiny, asked[0][0], result, None, add) > 0.1
