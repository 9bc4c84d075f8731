"""What a step keeps, and how it is split: budgets and passes change the cost and never the gradients."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import PROMPTS, TokenExamples, assert_equal_to_rounding, full
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.learning.engine import ActiveRegion, Engine, FitRequest, active_region
from actscale_fast.learning.engine.batch_plan import plan
from actscale_fast.learning.engine.row_store import RowStore, right_aligned
from actscale_fast.learning.execution import Execution

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)


def values(rows: list[int]) -> dict[str, Tensor]:
    """What the store holds of each row: two tensors that tell which row they are of."""
    each = torch.tensor(rows, dtype=torch.float32)
    return {"a": each[:, None].expand(-1, 3).clone(), "b": (each[:, None, None] + 100).expand(-1, 2, 2).clone()}


ROW_BYTES = 4 * (3 + 4)


def spilling(store: RowStore) -> RowStore:
    """The store with its spill, which rows that are in CPU memory already do not use."""
    near, far = store.budgets
    store.n_near = min(store.n_rows, near // ROW_BYTES)
    store.n_far = min(store.n_rows - store.n_near, far // ROW_BYTES)
    for name, value in values([0]).items():
        store.near[name] = value.new_empty(store.n_near, *value.shape[1:])
        store.far[name] = value.new_empty(store.n_far, *value.shape[1:])
    return store


def refuse(rows: list[int]) -> dict[str, Tensor]:
    raise AssertionError(f"rows {rows} are kept, and were asked for again")


@pytest.mark.parametrize("n_near", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("n_far", [None, 0, 2, 9])
def test_a_store_gives_every_row_back_wherever_it_lies(n_near: int, n_far: int | None) -> None:
    store = RowStore(6, n_near * ROW_BYTES + 5, (n_far or 0) * ROW_BYTES)
    if n_far is not None:
        spilling(store)
    asked: list[int] = []

    def missing(rows: list[int]) -> dict[str, Tensor]:
        asked.extend(rows)
        return values(rows)

    for rows in ([4, 0, 2], [5, 3, 1]):  # in the order of lengths, not of rows
        store.put(rows, values(rows))
    for rows in ([0, 1, 2, 3, 4, 5], [5, 5, 0, 3, 5], [2], [5, 4]):
        found = store.get(rows, missing)
        assert all(torch.equal(found[name], value) for name, value in values(rows).items())
    kept = min(6, n_near + (n_far or 0))
    assert set(asked) == set(range(kept, 6))
    assert store.n_bytes == kept * ROW_BYTES <= max(n_near + (n_far or 0), 6) * ROW_BYTES


def test_rows_that_are_kept_are_not_computed_again() -> None:
    store = RowStore(3, 1 << 20, 0)
    store.put([2, 0, 1], values([2, 0, 1]))
    for rows in ([0, 1, 2], [1, 2], [1], [2, 1], [0, 0]):
        assert torch.equal(store.get(rows, refuse)["a"], values(rows)["a"])


def test_alignment_keeps_the_last_columns() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert right_aligned(x, 2, 1).tolist() == [[1, 2], [4, 5]]
    assert right_aligned(x, 5, 1).tolist() == [[0, 0, 0, 1, 2], [0, 0, 3, 4, 5]]
    assert right_aligned(x, 3, 0).tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("where", "region"),
    [
        ({}, ActiveRegion(0, 12, 12)),
        ({"layers": [1]}, ActiveRegion(1, 12, 12)),
        ({"site": "residual", "layers": [0]}, ActiveRegion(1, 12, 12)),
        ({"site": "residual", "layers": [1]}, ActiveRegion(2, 12, 12)),
        ({"positions": [-1]}, ActiveRegion(0, 1, 12)),
        ({"positions": [-2, -1], "layers": [-1]}, ActiveRegion(1, 2, 12)),
        ({"positions": [0]}, ActiveRegion(0, 12, 12)),
        ({"positions": [9]}, ActiveRegion(0, 3, 12)),
        (
            {"positions": [4]},
            ActiveRegion(0, 8, 12),
        ),  # of the longest prompt; the other one has two from there
        ({"positions": [-5]}, ActiveRegion(0, 5, 12)),
        ({"positions": [99, -99]}, ActiveRegion(0, 1, 12)),
        ({"positions": [-1], "generated": True}, ActiveRegion(0, 1, 12)),
    ],
    ids=str,
)
def test_the_active_region_is_what_an_intervention_can_change(where: dict[str, Any], region: ActiveRegion) -> None:
    assert active_region(af.ActivScalar.for_model(tiny_model(), **where), TokenExamples()) == region


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "where", [{"layers": [1]}, {"positions": [-2, -1]}, {"positions": [-1], "layers": [1], "site": "residual"}], ids=str
)
def test_budgets_change_what_is_kept_and_not_the_gradients(
    family: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_model(family, dtype=torch.float64), TokenExamples()
    intervention = randomised(af.ActivScalar.for_model(model, **where))
    with torch.no_grad():
        intervention.alpha.mul_(0.3)
    expected = full(model, data, intervention, OBJECTIVE)
    with Engine(model, data, intervention, [OBJECTIVE]) as opened:
        row = opened.runner.store.n_bytes // len(data)
        assert opened.runner.store.n_near == len(data)
    allocate_as_from_a_gpu(monkeypatch)
    for near, far in ((4, 0), (0, 0), (2, 0), (2, 1), (0, 3), (1, 3), (0, 4)):
        execution = Execution(cache_bytes=near * row, spill_bytes=far * row)
        with Engine(model, data, intervention, [OBJECTIVE], execution) as opened:
            assert (opened.runner.store.n_near, opened.runner.store.n_far) == (near, far)
            for _ in range(2):
                terms, gradients = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
                assert_equal_to_rounding((terms[0], gradients), expected)


def allocate_as_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a store of CPU tensors have a spill too."""
    allocate = RowStore._allocate

    def with_spill(self: RowStore, given: dict[str, Tensor]) -> None:
        allocate(self, given)
        row = sum(value[0].numel() * value.element_size() for value in given.values())
        self.n_far = min(self.n_rows - self.n_near, self.budgets[1] // row)
        for name, value in given.items():
            self.far[name] = value.new_empty(self.n_far, *value.shape[1:])

    monkeypatch.setattr(RowStore, "_allocate", with_spill)


def test_what_everything_depends_on_is_not_kept() -> None:
    model, data = tiny_model(), TokenExamples()
    with Engine(model, data, af.ActivScalar.for_model(model), [OBJECTIVE]) as opened:
        assert opened.runner.store.n_bytes == 0


def cost(groups: list[list[int]], lengths: list[int], weight: int, pass_cost: int) -> int:
    return sum(len(group) * weight * max(lengths[item] for item in group) + pass_cost for group in groups)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All partitions of a list."""
    if not items:
        yield []
        return
    for smaller in partitions(items[1:]):
        yield [[items[0]], *smaller]
        for place in range(len(smaller)):
            yield [*smaller[:place], [items[0], *smaller[place]], *smaller[place + 1 :]]


@pytest.mark.parametrize("seed", range(12))
def test_without_a_bound_no_split_is_cheaper(seed: int) -> None:
    chosen = random.Random(seed)
    lengths = [chosen.randrange(1, 12) for _ in range(chosen.randrange(1, 8))]
    weight, pass_cost = chosen.choice([1, 2]), chosen.choice([0, 1, 5, 20, 100])
    found = plan(lengths, weight=weight, pass_cost=pass_cost, max_tokens=None)
    least = min(cost(groups, lengths, weight, pass_cost) for groups in partitions(list(range(len(lengths)))))
    assert cost(found, lengths, weight, pass_cost) == least


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_in_one_pass_and_no_pass_is_over_the_bound(seed: int) -> None:
    chosen = random.Random(seed)
    lengths = [chosen.randrange(1, 40) for _ in range(chosen.randrange(1, 60))]
    for max_tokens, weight, at_least in itertools.product((None, 1, 30, 200), (1, 2), (1, 3, 7, 100)):
        passes = plan(lengths, weight=weight, pass_cost=32, max_tokens=max_tokens, at_least=at_least)
        assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
        assert all(passes)
        assert len(passes) >= min(at_least, len(lengths))
        if max_tokens is not None:
            sizes = [len(items) * weight * max(lengths[item] for item in items) for items in passes]
            singles = [len(items) == 1 for items in passes]
            assert all(size <= max_tokens or single for size, single in zip(sizes, singles, strict=True))


def test_no_items_are_no_passes() -> None:
    assert plan([], weight=2, pass_cost=32, max_tokens=None, at_least=3) == []


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 9])
def test_a_step_runs_in_as_many_passes_as_asked_for(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model(dtype=torch.float64), TokenExamples([*PROMPTS, [7] * 12])
    intervention = af.ActivScalar.for_model(model, layers=[1])
    expected = full(model, data, intervention, OBJECTIVE)
    with Engine(model, data, intervention, [OBJECTIVE], Execution(accumulate)) as opened:
        calls: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
        terms, gradients = opened.gradients([FitRequest(range(5), OBJECTIVE)])
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = opened.gradients([FitRequest(range(5), OBJECTIVE)])
    assert_equal_to_rounding((terms[0], gradients), expected)
    assert torch.equal(again[1][0], gradients[0])
    assert len(calls) >= min(accumulate, 5)


@pytest.mark.parametrize("where", [{}, {"positions": [-1]}], ids=str)
def test_less_memory_means_more_passes_and_the_same_gradients(where: dict[str, Any]) -> None:
    model, data, n_passes = tiny_model(dtype=torch.float64), TokenExamples(), []
    intervention = randomised(af.ActivScalar.for_model(model, **where))
    expected = full(model, data, intervention, OBJECTIVE)
    for budget in (1, 20_000, 1 << 30):
        calls: list[int] = []
        with Engine(model, data, intervention, [OBJECTIVE], Execution(memory_bytes=budget)) as opened:
            handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            terms, gradients = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
            handle.remove()
        assert_equal_to_rounding((terms[0], gradients), expected, 1e-5)
        n_passes.append(len(calls))
    assert n_passes[0] == len(data)
    assert n_passes == sorted(n_passes, reverse=True)
    assert n_passes[-1] < n_passes[0]
