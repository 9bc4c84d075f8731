"""The frozen model runs on a prompt when a step first uses it, in a company that does not depend on when that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import TokenExamples, assert_equal_to_rounding, engine, full
from fit_cases import conflicts, interrupted_at
from model_zoo import randomised, tiny_model

import actscale_fast as af
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.engine.reference_cache import REFERENCE_TOKENS, reference_passes
from actscale_fast.learning.execution import Execution
from actscale_fast.learning.fit_settings import FitSettings

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7, minimality=0.01)


class ManyPrompts(TokenExamples):
    """As many prompts as asked for, of several lengths, whose answers the tiny models know."""

    def __init__(self, count: int) -> None:
        super().__init__([[2 + i % 40, 3 + i % 7] * (2 + i % 5) for i in range(count)])
        self.correct, self.wrong = torch.arange(count) % 20 + 10, torch.arange(count) % 20 + 31


@contextmanager
def rows_without_gradient(model: Any) -> Iterator[list[int]]:
    """The number of rows of each forward pass without gradients."""
    counts: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            counts.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("count", [5, 128, 129, 300])
def test_every_row_is_in_one_pass(count: int) -> None:
    data = ManyPrompts(count)
    used = FitSettings(steps=6, batch_size=8, seed=3).first_uses(count)
    for stages in (None, [used], [[4, 2], used, used[:3]]):
        passes = reference_passes(data, stages)
        assert sorted(row for rows in passes for row in rows) == list(range(count))
        assert max(map(len, passes)) <= 32
    if count == 300:
        touched = {number for number, rows in enumerate(reference_passes(data, [used])) if set(rows) & set(used)}
        assert len(touched) <= 3  # 48 rows, beside those that every engine looks at


def test_few_prompts_run_as_they_always_did() -> None:
    data = ManyPrompts(100)
    assert reference_passes(data, [[7, 5, 3]]) == data.by_length(32)


def test_long_prompts_do_not_share_a_pass() -> None:
    data = TokenExamples([[1] * 6000, [2] * 6000, [3] * 9000, [4] * 3])
    for rows in reference_passes(data):
        assert len(rows) == 1 or len(rows) * max(len(data.prompts[row]) for row in rows) <= REFERENCE_TOKENS


def test_only_rows_that_a_fit_uses_run() -> None:
    model = tiny.llama()
    options: dict[str, Any] = {"lr": 0.05, "progress": False}
    counts: list[int] = []
    for steps, size in ((3, 4), (4, 40)):
        scalars = af.ActivScalar.for_model(model)
        with rows_without_gradient(model) as found:
            af.fit(
                model, tiny.tokenizer(), conflicts(160), scalars, OBJECTIVE, steps=steps, batch_size=size, **options
            )  # fmt: skip
        counts.append(sum(found))
    few, every = counts
    assert few < 80  # of which about 45 are rows that checks run
    assert 160 <= every < 240


def test_each_of_several_processes_runs_its_own_rows() -> None:
    from actscale_fast.learning.distributed import ProcessGroup
    from actscale_fast.learning.fit import _stages

    settings, found = FitSettings(steps=4, batch_size=6, seed=1), []
    for rank in range(2):
        group = ProcessGroup(rank, 2, n_processes=2)
        stages = _stages(af.Objective(minimality="5%"), settings, range(90), group)
        used = [row for step in range(4) for row in group.shard(settings.rows(90, step))]
        assert stages[1] == used
        found.append(set(used))
    assert not found[0] & found[1]


@pytest.mark.parametrize("where", [{}, {"layers": [1]}, {"positions": [-1]}], ids=str)
def test_a_resumed_fit_ends_with_the_same_bits(where: dict[str, Any], tmp_path: Path) -> None:
    values = []
    options: dict[str, Any] = {"steps": 8, "batch_size": 5, "lr": 0.05, "progress": False, "schedule": "constant"}
    for cut in (False, True):
        model, path = tiny.llama(), tmp_path / f"{cut}.safetensors"
        scalars = af.ActivScalar.for_model(model, **where)
        if cut:
            with interrupted_at(5):
                af.fit(model, tiny.tokenizer(), conflicts(200), scalars, OBJECTIVE, checkpoint=path, **options)
            scalars = af.ActivScalar.for_model(model, **where)
        af.fit(model, tiny.tokenizer(), conflicts(200), scalars, OBJECTIVE, checkpoint=path, **options)
        values.append(scalars.alpha.detach())
    assert torch.equal(*values)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_stay_within_the_budgets(family: str, kl: Any) -> None:
    model, data = tiny_model(family), ManyPrompts(200)
    objective = af.Objective(margin=3.0, faithfulness=0.7, kl=kl)
    scalars = randomised(af.ActivScalar.for_model(model, layers=[0]), 1, 0.3)
    rows = [3, 150, 77, 9]
    expected = full(model, data, scalars, objective, rows=rows)
    row = model.config.get_text_config().vocab_size * 4
    keeps_logits = family == "gemma2" or kl == "reverse"
    for budget in (1 << 30, 10 * row, 0):
        with Engine(model, data, scalars, [objective], Execution(cache_bytes=budget)) as opened:
            for _ in range(2):
                terms, gradients = opened.gradients([FitRequest(rows, objective)])
                assert_equal_to_rounding((terms[0], gradients), expected, 1e-4)
            assert opened.runner.store.n_bytes <= budget
            assert (opened.runner.store.n_bytes > 0) is (keeps_logits and budget > 0)


def test_logits_of_a_head_that_cannot_be_read_stay_within_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actscale_fast.frozen.shortcuts.read_head", lambda *_: None)
    model, data = tiny_model(), ManyPrompts(150)
    scalars = randomised(af.ActivScalar.for_model(model, layers=[1]), 1, 0.3)
    expected = full(model, data, scalars, OBJECTIVE, rows=[3, 140, 77])
    for budget in (1 << 30, 20_000, 0):
        found = engine(model, data, scalars, OBJECTIVE, rows=[3, 140, 77], cache_bytes=budget)
        assert_equal_to_rounding(found, expected, 1e-4)
        with Engine(model, data, scalars, [OBJECTIVE], Execution(cache_bytes=budget)) as opened:
            assert opened.runner.head is None
            assert opened.runner.store.n_bytes <= budget
