"""Each request of a mixed batch gets its own intervention, and nothing of its neighbours'."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Edit, adding, ask, effect, log_probabilities, params, require_equal, said, scaling, serving
from tiny_llama import HEADS, LAYERS, TinyLlama, save
from torch import Tensor

import actscale_fast as af

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (40, 17), (90, 33), (60, 70))]


@pytest.fixture(scope="module")
def everything(tiny: TinyLlama, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scalars, vectors v and w, probes d and e, and vectors o and q at the attention's output."""
    found = tmp_path_factory.mktemp("everything")
    for path in folder.iterdir():
        (found / path.name).symlink_to(path)
    generator = torch.Generator().manual_seed(2)
    save(tiny, found / "v", generator, "SteerVec")
    save(tiny, found / "w", generator, "SteerVec", layers=[1])
    save(tiny, found / "d", generator, "DynScalar")
    save(tiny, found / "e", generator, "DynScalar", layers=[0, 2], positions=[1], generated=True)
    save(tiny, found / "o", generator, "SteerVec", site="attn_out")
    save(tiny, found / "q", generator, "SteerVec", site="attn_out", layers=[1], positions=[0], generated=True)
    return found


@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(request: pytest.FixtureRequest, tiny: TinyLlama, everything: Path) -> Iterator[Any]:
    with serving(tiny, everything, enforce_eager=request.param == "eager") as engine:
        yield engine


def scalars(folder: Path, name: str, slot: int = 0) -> Tensor:
    found = af.load_intervention(folder / name)
    assert isinstance(found, af.ActivScalar)
    return found.alpha.detach()[:, slot]


def test_every_request_of_a_mixed_batch_equals_transformers(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    a, b = scalars(everything, "a"), scalars(everything, "b")
    requests: list[tuple[list[int], Any]] = []
    edits: list[Edit | None] = []
    for prompt in PROMPTS:
        n = len(prompt)
        on_prompt, on_generated = scaling(b, 0.5, lambda at, n=n: at < n), scaling(b, -0.7, lambda at, n=n: at >= n)
        for extra, edit in (
            ({}, None),
            ({"actscale": "a"}, scaling(a, 1.0)),
            ({"actscale": "a", "actscale_strength": -1}, scaling(a, -1.0)),
            ({"actscale": "b", "actscale_strength": 0.5, "actscale_where": "prompt"}, on_prompt),
            ({"actscale": "b", "actscale_strength": -0.7, "actscale_where": "generated"}, on_generated),
        ):
            requests.append((prompt, params(**extra)))
            edits.append(edit)
    for (prompt, _), result, edit in zip(requests, ask(llm, requests), edits, strict=True):
        require_equal(tiny, prompt, result, edit)
        assert edit is None or effect(tiny, prompt, result, edit) > 0.1


def test_several_interventions_are_applied_in_order(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    a, b = scalars(everything, "a"), scalars(everything, "b")

    def both(heads: Tensor, layer: int) -> Tensor:
        return scaling(b, 0.25)(scaling(a, -0.5)(heads, layer), layer)

    extra = {"actscale": "a+b", "actscale_strength": [-0.5, 0.25]}
    result = ask(llm, [(PROMPTS[1], params(**extra))])[0]
    require_equal(tiny, PROMPTS[1], result, both)


def test_an_intervention_keeps_the_positions_that_it_was_saved_with(
    llm: Any, tiny: TinyLlama, everything: Path
) -> None:
    slots = [scalars(everything, "p", slot) for slot in range(3)]  # of the positions 0, −1 and the generated tokens

    def edit(n: int) -> Edit:
        parts = [
            scaling(slots[0], 1.0, lambda at: at == 0),
            scaling(slots[1], 1.0, lambda at: at == n - 1),
            scaling(slots[2], 1.0, lambda at: at >= n),
        ]

        def change(heads: Tensor, layer: int) -> Tensor:
            for part in parts:
                heads = part(heads, layer)
            return heads

        return change

    for prompt, result in zip(PROMPTS, ask(llm, [(prompt, params(actscale="p")) for prompt in PROMPTS]), strict=True):
        require_equal(tiny, prompt, result, edit(len(prompt)))


def test_a_request_may_list_positions_of_its_prompt(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    a, prompt = scalars(everything, "a"), PROMPTS[2]
    n = len(prompt)
    chosen = {"actscale": "a", "actscale_where": [2, -3, "generated"]}
    marked = scaling(a, 1.0, lambda at: (at == 2) | (at == n - 3) | (at >= n))
    require_equal(tiny, prompt, ask(llm, [(prompt, params(**chosen))])[0], marked)


def test_vectors_and_probes_are_served_beside_scalars(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    loaded = {name: af.load_intervention(everything / name) for name in "vwde"}
    a = scalars(everything, "a")
    v, d = loaded["v"].vectors.detach()[:, 0].double(), loaded["d"].probes.detach()[:, 0].double()

    def with_vector(heads: Tensor, layer: int) -> Tensor:
        return heads + 0.5 * v[layer]

    def in_one_layer(heads: Tensor, layer: int) -> Tensor:
        return heads + loaded["w"].vectors.detach()[0, 0].double() if layer == 1 else heads

    def with_probes(heads: Tensor, layer: int) -> Tensor:
        return heads * (1 - 0.5 * (d[layer] * heads).sum(-1, keepdim=True))

    def all_three(heads: Tensor, layer: int) -> Tensor:
        return with_probes(scaling(a, 1.0)(with_vector(heads, layer), layer), layer)

    asked = {
        "v": ({"actscale": "v", "actscale_strength": 0.5}, with_vector),
        "w": ({"actscale": "w"}, in_one_layer),
        "d": ({"actscale": "d", "actscale_strength": -0.5}, with_probes),
        "v+a+d": ({"actscale": ["v", "a", "d"], "actscale_strength": [0.5, 1.0, -0.5]}, all_three),
    }
    prompt = PROMPTS[1]
    results = ask(llm, [*((prompt, params(**extra)) for extra, _ in asked.values()), (prompt, params())])
    for (_, edit), result in zip([*asked.values(), ({}, None)], results, strict=True):
        require_equal(tiny, prompt, result, edit)
        assert edit is None or effect(tiny, prompt, result, edit) > 0.1


def test_probes_with_positions_are_applied_at_these(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    probes, prompt = af.load_intervention(everything / "e").probes.detach()[:, 0].double(), PROMPTS[1]

    def edit(heads: Tensor, layer: int) -> Tensor:
        if layer == 1:
            return heads
        at = torch.arange(len(heads))
        factor = 1 + (probes[layer // 2] * heads).sum(-1, keepdim=True)
        return torch.where(((at == 1) | (at >= len(prompt)))[:, None, None], heads * factor, heads)

    require_equal(tiny, prompt, ask(llm, [(prompt, params(actscale="e"))])[0], edit)


def test_vectors_are_added_to_the_output_of_attention(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    a, o = scalars(everything, "a"), af.load_intervention(everything / "o").vectors.detach()[:, 0, 0]
    first, generated = af.load_intervention(everything / "q").vectors.detach()[0, :, 0].double()

    def q(x: Tensor, layer: int) -> Tensor:
        if layer != 1:
            return x
        at = torch.arange(len(x))[:, None]
        return x + (at == 0) * first + (at >= n) * generated

    def both(x: Tensor, layer: int) -> Tensor:
        return q(adding(o, -0.5)(x, layer), layer)

    prompt = PROMPTS[1]
    n = len(prompt)
    cases: list[tuple[dict[str, Any], Edit | None, Edit | None]] = [
        ({}, None, None),
        ({"actscale": "o"}, None, adding(o, 1.0)),
        ({"actscale": "o", "actscale_strength": -0.5, "actscale_where": "prompt"}, None,
         adding(o, -0.5, lambda at: at < n)),
        ({"actscale": "o", "actscale_where": [2, "generated"]}, None, adding(o, 1.0, lambda at: (at == 2) | (at >= n))),
        ({"actscale": "q"}, None, q),
        ({"actscale": "a+q"}, scaling(a, 1.0), q),
        ({"actscale": "o+a+q", "actscale_strength": [-0.5, 0.5, 1.0]}, scaling(a, 0.5), both),
        ({"actscale": "a"}, scaling(a, 1.0), None),
    ]  # fmt: skip
    results = ask(llm, [(prompt, params(**extra)) for extra, _, _ in cases])
    for (extra, edit, output), result in zip(cases, results, strict=True):
        require_equal(tiny, prompt, result, edit, output)
        assert not extra or effect(tiny, prompt, result, edit, output) > 0.1


def test_strength_0_is_a_request_without_an_intervention(llm: Any) -> None:
    first, second = ask(llm, [(PROMPTS[0], params()), (PROMPTS[0], params(actscale="a", actscale_strength=0.0))])
    assert torch.equal(log_probabilities(first), log_probabilities(second))


def test_parallel_samples_of_one_request_are_all_steered(llm: Any, tiny: TinyLlama, everything: Path) -> None:
    from vllm import SamplingParams

    many = SamplingParams(n=3, temperature=1.0, seed=0, max_tokens=6, logprobs=1, detokenize=False,
                          extra_args={"actscale": "a"})  # fmt: skip
    result = ask(llm, [(PROMPTS[0], many)])[0]
    assert len(result.outputs) == 3
    for output in result.outputs:
        exact = tiny.log_probabilities([*PROMPTS[0], *output.token_ids], scaling(scalars(everything, "a"), 1.0))
        for at, token in enumerate(output.token_ids):
            assert abs(output.logprobs[at][token].logprob - float(exact[len(PROMPTS[0]) - 1 + at, token])) < 1e-4


def test_a_merged_checkpoint_says_the_same(tiny: TinyLlama, folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.folder)
    af.merge(model, af.load_intervention(folder / "a"))
    model.save_pretrained(tmp_path / "merged")
    asked = [(prompt, params()) for prompt in PROMPTS]
    with serving(tmp_path / "merged", None) as stock:
        merged = ask(stock, asked)
    with serving(tiny, folder) as engine:
        steered = ask(engine, [(prompt, params(actscale="a")) for prompt in PROMPTS])
    for one, other in zip(merged, steered, strict=True):
        assert said(one) == said(other)
        assert (log_probabilities(one) - log_probabilities(other)).abs().max() < 1e-4


def test_the_start_says_what_is_served(tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.actscale_fast"), "info", lines.append)
    with serving(tiny, folder, max_num_seqs=5) as engine:
        status = engine.collective_rpc("actscale_status")
    expected = (
        f"ActivScalar in {LAYERS} layers, heads 0 to {HEADS - 1} of {HEADS} (rank 0 of 1); 40 rows for 5 requests"
    )
    assert len(lines) == 1
    assert expected in lines[0]
    assert status[0]["rows"] == 40
    assert status[0]["rows_held"] == 0
