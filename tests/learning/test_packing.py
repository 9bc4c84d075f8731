"""Prompts packed into rows: each is computed as if it stood alone, and what two begin with in common runs once."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from engine_cases import TokenExamples, assert_equal_to_rounding, full
from model_zoo import CONFIGS, randomised, tiny_model

import actscale_fast as af
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.engine.microbatches import MicrobatchPlanner, RequestedPrompt
from actscale_fast.learning.engine.packing import COLUMNS, additive, rows_of, tree_of
from actscale_fast.learning.engine.packing_check import attention_may_pack
from actscale_fast.learning.execution import Execution

#: Common beginnings of several depths, one prompt that begins another one, two that are the same, one of one token.
PROMPTS = [[5, 9, 12, 7], [5, 9, 12, 8, 3], [5, 9, 4], [5, 9, 12], [6, 2, 9], [6, 2, 9], [7], [5, 9, 12, 7, 7, 7]]
ALL = range(len(PROMPTS))
OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)
#: Families whose positions or masks do not come from arguments alone.
NOT_PACKED = {"bloom", "mpt"}
#: Windows wide enough for a row of several prompts; those of the tiny models are as narrow as a prompt.
WINDOWS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 256},
    "gemma3_text": {"sliding_window": 256},
    "gpt_neo": {"window_size": 256, "max_position_embeddings": 256},
}


@pytest.fixture(autouse=True)
def packing_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models would not pay for it: their attention weighs more."""
    monkeypatch.setattr(MicrobatchPlanner, "cost", lambda self, part, weight: 0 if part[0].tree else 1e9)


def packed(opened: Engine) -> bool:
    passes = opened.runner.planner.microbatches([RequestedPrompt(0, row) for row in ALL], [FitRequest(ALL, OBJECTIVE)])
    return all(row.tree is not None for part in passes for row in part)


def prompts_of(generator: random.Random, n: int) -> list[list[int]]:
    return [[generator.randrange(2) for _ in range(generator.randrange(1, 9))] for _ in range(n)]


def test_a_tree_holds_every_prompt_as_a_path_and_every_beginning_once() -> None:
    for seed in range(30):
        prompts = sorted(prompts_of(random.Random(seed), 7))
        tree = tree_of(prompts)
        beginnings = {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)}
        assert tree.width == len(beginnings)
        allowed = tree.allowed(tree.width + 2)
        for prompt, path in zip(prompts, tree.paths, strict=True):
            assert [tree.tokens[column] for column in path] == prompt
            assert [tree.depths[column] for column in path] == list(range(len(prompt)))
            for end, column in enumerate(path):
                assert allowed[column].nonzero().flatten().tolist() == sorted(path[: end + 1])
        for column, (number, position) in enumerate(tree.sources):
            assert tree.paths[number][position] == column
        assert torch.equal(allowed[tree.width :].nonzero()[:, 1], torch.arange(tree.width, tree.width + 2))


def test_rows_hold_every_prompt_once_and_are_as_narrow_as_their_number_allows() -> None:
    for seed, columns in itertools.product(range(20), (1, 9, 20, 1000)):
        prompts = prompts_of(random.Random(seed), 11)
        rows = rows_of(prompts, columns)
        assert sorted(place for row in rows for place in row) == list(range(11))
        widths = [tree_of([prompts[place] for place in row]).width for row in rows]
        if columns == 1000:
            assert widths == [tree_of(sorted(prompts)).width]
        if columns == 1:
            assert max(widths) == max(map(len, prompts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_forbids_without_infinities(dtype: torch.dtype) -> None:
    mask = additive(torch.eye(3, dtype=torch.bool), dtype)
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    assert torch.equal(mask.to(torch.float32).softmax(-1), torch.eye(3))


@pytest.mark.parametrize("place", [{}, {"layers": [1]}, {"site": "residual", "layers": [0]}, {"site": "attn_out"}])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_packed_prompts_have_the_gradients_of_the_full_computation(family: str, place: dict[str, Any]) -> None:
    # Gemma 2 takes the softmax of float64 scores in float32, where padding's mask is −inf.
    dtype, tolerance = (torch.float32, 2e-4) if family == "gemma2" else (torch.float64, 2e-6)
    model = tiny_model(family, dtype=dtype, **WINDOWS.get(family, {}))
    data = TokenExamples(PROMPTS)
    for still in (True, False):
        intervention = af.ActivScalar.for_model(model, **place)
        if not still:
            randomised(intervention)
            with torch.no_grad():
                intervention.alpha.mul_(0.3)
        if family in NOT_PACKED:
            with Engine(model, data, intervention, [OBJECTIVE]) as opened:
                assert not packed(opened)
            continue
        expected = full(model, data, intervention, OBJECTIVE)
        with Engine(model, data, intervention, [OBJECTIVE]) as opened:
            assert packed(opened)
            terms, gradients = opened.gradients([FitRequest(ALL, OBJECTIVE)])
        assert_equal_to_rounding((terms[0], gradients), expected, tolerance)


def test_shares_are_packed_apart_and_keep_their_own_scalars_and_directions() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    data = TokenExamples(PROMPTS)
    singles = [randomised(af.ActivScalar.for_model(model), seed) for seed in range(3)]
    stack = af.ActivScalar.stack(singles)
    objectives = [OBJECTIVE, af.Objective(margin=1.0, directions=(-1,)), af.Objective(faithfulness=0.1)]
    rows = [[0, 1, 2, 3], [3, 4, 5, 7], [0, 6, 7]]
    requests = [
        FitRequest(mine, objective, group) for group, (mine, objective) in enumerate(zip(rows, objectives, strict=True))
    ]
    with Engine(model, data, stack, objectives) as opened:
        prompts = [RequestedPrompt(index, row) for index, request in enumerate(requests) for row in request.rows]
        packed_rows = [row for part in opened.runner.planner.microbatches(prompts, requests) for row in part]
        assert all(row.tree and len({prompt.request for prompt in row.prompts}) == 1 for row in packed_rows)
        terms, gradients = opened.gradients(requests)
    for group, (single, objective, mine) in enumerate(zip(singles, objectives, rows, strict=True)):
        expected = full(model, data, single, objective, mine)
        assert_equal_to_rounding((terms[group], [gradients[0][group]]), expected, 2e-6)


def test_constants_that_are_not_kept_are_computed_again_for_packed_prompts() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    data = TokenExamples(PROMPTS)
    intervention = randomised(af.ActivScalar.for_model(model, layers=[1]))
    expected = full(model, data, intervention, OBJECTIVE)
    for cache_bytes in (0, 10_000, 1 << 30):
        with Engine(model, data, intervention, [OBJECTIVE], execution=Execution(cache_bytes=cache_bytes)) as opened:
            assert packed(opened)
            terms, gradients = opened.gradients([FitRequest(ALL, OBJECTIVE)])
        assert_equal_to_rounding((terms[0], gradients), expected, 2e-6)


@pytest.mark.parametrize("reason", ["positions", "accumulate", "another patch", "a window", "compiled", "one prompt"])
def test_prompts_stay_apart_where_packing_would_be_wrong_or_of_no_use(reason: str) -> None:
    changes = {"sliding_window": 4} if reason == "a window" else {}
    model: Any = tiny_model("mistral" if changes else "llama", **changes)
    intervention = af.ActivScalar.for_model(model, positions=[0, -1] if reason == "positions" else None)
    called = torch.compile(model, backend="eager") if reason == "compiled" else model
    data = TokenExamples(PROMPTS[:1] if reason == "one prompt" else PROMPTS)
    other = af.patch(model, randomised(af.ActivScalar.for_model(model, positions=[-1])), strength=0.1)
    if reason != "another patch":
        other.remove()
    execution = Execution(accumulate=2 if reason == "accumulate" else 1)
    with Engine(called, data, intervention, [OBJECTIVE], execution) as opened:
        assert not opened.runner.planner.packs


def test_only_attention_that_takes_masks_may_be_packed() -> None:
    config = tiny_model("llama").config
    assert attention_may_pack(config, 12)
    config.sliding_window = 12 + max(COLUMNS) - 1  # a row may be as wide as that
    assert not attention_may_pack(config, 12)
    assert attention_may_pack(config, 11)
    config._attn_implementation = "flash_attention_2"
    assert not attention_may_pack(config, 11)


def test_biases_that_are_made_from_a_mask_of_tokens_are_not_packed() -> None:
    model = tiny_model("falcon", alibi=True)
    intervention = randomised(af.ActivScalar.for_model(model))
    expected = full(model, TokenExamples(PROMPTS), intervention, OBJECTIVE)
    with Engine(model, TokenExamples(PROMPTS), intervention, [OBJECTIVE]) as opened:
        assert not opened.runner.planner.packs
        terms, gradients = opened.gradients([FitRequest(ALL, OBJECTIVE)])
    assert_equal_to_rounding((terms[0], gradients), expected, 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 50])
def test_a_model_whose_attention_ignores_the_mask_is_found_out(length: int, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    prompts = [[5 + row] * (length + row) for row in range(3)]
    with Engine(model, TokenExamples(prompts), af.ActivScalar.for_model(model), [OBJECTIVE]) as opened:
        assert opened.runner.planner.packs
    for layer in model.model.layers:
        attention = layer.self_attn
        original = attention.forward

        def causal(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            return original(*args, **kwargs | {"attention_mask": None})

        attention.forward = causal
    with Engine(model, TokenExamples(prompts), af.ActivScalar.for_model(model), [OBJECTIVE]) as opened:
        assert not opened.runner.planner.packs
