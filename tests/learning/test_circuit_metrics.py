"""MIB's circuit metrics of heads against a plain loop: one circuit, one prompt and one pass at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from fit_cases import conflicts
from torch import Tensor

import actscale_fast as af

N_LAYERS, N_HEADS, WIDTH = 3, 4, 8
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
SOURCE = ["one", "two", "three", "four", "five", "six", "A", "B", "C", "Q"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(dtype=torch.float64)


def ids_of(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def examples() -> list[af.Example]:
    """Prompts of several lengths, each with a source of as many tokens."""
    made = [replace(e, prompt=e.prompt.removesuffix(" answer")) for e in conflicts(6)]
    return [replace(e, source=" ".join(SOURCE[: len(ids_of(e.prompt))])) for e in made]


def run(model: Any, ids: list[int], edit: Any) -> Tensor:
    """The next-token logits with `edit(layer, [T, 4, 8])` at the input of each output projection."""

    def pre(layer: int) -> Any:
        return lambda module, args: (edit(layer, args[0][0].unflatten(-1, (N_HEADS, WIDTH))).flatten(1)[None],)

    modules = [layer.self_attn.o_proj for layer in model.model.layers]
    handles = [module.register_forward_pre_hook(pre(layer)) for layer, module in enumerate(modules)]
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def plain(model: Any, kept: Tensor, ablation: str) -> float:
    """The mean logit difference of the circuit whose heads are True in kept [L, H]."""
    values = []
    for example in examples():
        stored: list[Tensor] = []

        def note(layer: int, x: Tensor, stored: list[Tensor] = stored) -> Tensor:
            stored.append(x.clone())
            return x

        assert isinstance(example.source, str)
        run(model, ids_of(example.source), note)

        def ablate(layer: int, x: Tensor, stored: list[Tensor] = stored) -> Tensor:
            other = stored[layer] if ablation == "interchange" else torch.zeros_like(x)
            return torch.where(kept[layer][:, None], x, other)

        logits = run(model, ids_of(example.prompt), ablate)
        values.append(float(logits[ids_of(example.correct)[0]] - logits[ids_of(example.wrong)[0]]))
    return sum(values) / len(values)


@pytest.mark.parametrize("ablation", ["zero", "interchange"])
def test_faithfulness_and_areas_are_those_of_a_plain_loop(model: Any, ablation: Literal["zero", "interchange"]) -> None:
    scores = torch.randn(N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(3))
    found = af.circuit_metrics(model, tiny.tokenizer(), examples(), scores, ablation=ablation, batch_size=4)
    order = scores.abs().flatten().argsort(descending=True)
    sizes = [int(share * 12) for share in SHARES]
    assert found.n_heads == tuple(sizes) == (0, 0, 0, 0, 0, 0, 1, 2, 6, 12)
    values = {}
    for size in set(sizes):
        kept = torch.zeros(12, dtype=torch.bool)
        kept[order[:size]] = True
        values[size] = plain(model, kept.view(N_LAYERS, N_HEADS), ablation)
    f = [(values[size] - values[0]) / (values[12] - values[0]) for size in sizes]
    assert found.faithfulness == pytest.approx(f, rel=1e-5, abs=1e-6)
    assert found.full == pytest.approx(values[12], rel=1e-6)
    assert found.empty == pytest.approx(values[0], rel=1e-6)
    y, x = torch.tensor(f, dtype=torch.float64), torch.tensor(SHARES, dtype=torch.float64)
    assert found.cpr == pytest.approx(float(torch.trapezoid(y, x)), rel=1e-5)
    assert found.cmd == pytest.approx(float(torch.trapezoid((1 - y).abs(), x)), rel=1e-5)
    assert f"CPR {found.cpr:.3f}" in str(found)


def test_a_selection_is_judged_and_written_in_the_tracks_format(model: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"strength": 1.0, "progress": False, "layers": [0, 2]}
    selection = af.select_heads(model, tiny.tokenizer(), examples(), "attribution", 2, **given)
    assert af.circuit_metrics(model, tiny.tokenizer(), examples(), selection).n_heads[-1] == 8
    af.save_mib_scores(tmp_path / "heads.json", model, selection)
    found = json.loads((tmp_path / "heads.json").read_text(encoding="utf-8"))
    assert found["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    assert found["edges"] == {}
    names = {"input", "logits", *(f"m{i}" for i in range(3)), *(f"a{i}.h{j}" for i in range(3) for j in range(4))}
    assert found["nodes"].keys() == names
    assert {name for name, node in found["nodes"].items() if "score" in node} == {
        f"a{i}.h{j}" for i in (0, 2) for j in range(4)
    }
    assert found["nodes"]["a2.h1"]["score"] == float(selection.scores[1, 1])
    for layers, message in (([0, 3], "layers: got 3, expected -3 to 2"), ([0, -3], "layers")):  # the same layer twice
        with pytest.raises(ValueError, match=message):
            af.save_mib_scores(tmp_path / "none.json", model, selection.scores, layers=layers)
    assert not (tmp_path / "none.json").exists()


def test_what_cannot_be_judged_is_refused(model: Any) -> None:
    judge, tokenizer = af.circuit_metrics, tiny.tokenizer()
    with pytest.raises(ValueError, match=r"scores: got shape \(2, 4\), expected finite values \[L, H\] = \[3, 4\]"):
        judge(model, tokenizer, examples(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="ablation: got 'mean'"):
        judge(model, tokenizer, examples(), torch.zeros(3, 4), ablation="mean")  # type: ignore[arg-type]
    shorter = [replace(examples()[0], source="one two")]
    with pytest.raises(ValueError, match=r"row 1 of examples: the prompt has . tokens and its source 2"):
        judge(model, tokenizer, shorter, torch.zeros(3, 4), ablation="interchange")
