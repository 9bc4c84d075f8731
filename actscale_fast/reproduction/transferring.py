"""Evaluates what was learned in one wording on longer prompts and in other wordings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..architectures.layout import layout
from ..interventions import Intervention
from ..tasks.examples import Example
from .laboratory import Laboratory
from .systems import SYSTEMS, System
from .task_forms import Task, longer


def transferred() -> tuple[System, ...]:
    """The systems that apply to prompts of any length."""
    return tuple(system for system in SYSTEMS if system.any_length)


def to_length(lab: Laboratory, task: Task, n_sentences: int) -> dict[str, Any]:
    """Test records of all such systems on prompts that follow unrelated sentences, each in its own form of the task."""

    def test(seed: int, *, aligned: bool) -> list[Example]:
        examples = task.examples(lab.tokenizer, lab.size, seed, aligned=aligned).test[: lab.size.n_transferred]
        return longer(examples, n_sentences)

    return _by_form(lab, task, test)


def to_wording(lab: Laboratory, task: Task, wording: str) -> dict[str, Any]:
    """Test records of all such systems on questions in words that nothing was learned on.

    The prompts of a system ask for what its own form of the task holds out.
    """
    return _by_form(lab, task, partial(task.reworded, lab.tokenizer, lab.size, wording=wording))


def _by_form(lab: Laboratory, task: Task, test: Callable[..., list[Example]]) -> dict[str, Any]:
    """Test records of the systems of each form on the prompts `test(seed, aligned=…)` of that form."""
    found: dict[str, Any] = {}
    for aligned in (False, True):
        systems = [system for system in transferred() if system.aligned is aligned]
        seeds = lab.size.seeds[: lab.size.transfer_seeds]
        found |= _measured(lab, task, systems, [(seed, test(seed, aligned=aligned)) for seed in seeds])
    return found


def _measured(lab: Laboratory, task: Task, systems: Any, runs: list[tuple[int, list[Example]]]) -> dict[str, Any]:
    """By system: the lengths of the prompts, and one record per seed; none if they exceed the model's context."""
    prompts = [example.prompt for _, test in runs for example in test]
    lengths = [len(ids) for ids in lab.tokenizer(prompts)["input_ids"]]
    context = layout(lab.model).max_context
    records: dict[str, list[Any]] = {system.name: [] for system in systems}
    if context is None or max(lengths) <= context:
        for seed, test in runs:
            interventions: list[Intervention] = [lab.learned(task, system, seed) for system in systems]
            for system, one in zip(systems, lab.measured(test, interventions), strict=True):
                records[system.name].append(one)
    return {name: {"lengths": [min(lengths), max(lengths)], "runs": some} for name, some in records.items()}
