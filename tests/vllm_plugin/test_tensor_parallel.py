"""Two ranks, each with its own heads, in processes of their own."""

from __future__ import annotations

from pathlib import Path

from engines import ask, params, require_equal, serving
from test_scheduling import batch
from tiny_llama import TinyLlama


def test_two_ranks_equal_transformers(tiny: TinyLlama, folder: Path) -> None:
    asked = batch(folder, [12, 50])
    with serving(tiny, folder, tensor_parallel_size=2) as llm:
        results = ask(llm, [(prompt, params(**extra)) for prompt, extra, _ in asked])
        status = llm.collective_rpc("actscale_status")
    assert [one["heads"] for one in status] == [[0, 2], [2, 4]]
    for (prompt, _, edit), result in zip(asked, results, strict=True):
        require_equal(tiny, prompt, result, edit)
