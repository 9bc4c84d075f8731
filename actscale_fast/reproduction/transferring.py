"""Evaluates what was learned in one wording on longer prompts and in other wordings."""

from __future__ import annotations

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
    found: dict[str, Any] = {}
    for aligned in (False, True):
        systems = [system for system in transferred() if system.aligned is aligned]
        runs = []
        for seed in lab.size.seeds[: lab.size.transfer_seeds]:
            test = task.examples(lab.tokenizer, lab.size, seed, aligned=aligned).test[: lab.size.n_transferred]
            runs.append((seed, longer(test, n_sentences)))
        found |= _measured(lab, task, systems, runs)
    return found


def to_wording(lab: Laboratory, task: Task, wording: str) -> dict[str, Any]:
    """Test records of all such systems on the same questions in words that nothing was learned on."""
    seeds = lab.size.seeds[: lab.size.transfer_seeds]
    runs = [(seed, task.reworded(lab.tokenizer, lab.size, seed, wording)) for seed in seeds]
    return _measured(lab, task, transferred(), runs)


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
