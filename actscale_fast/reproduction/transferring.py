"""Evaluates what was learned on prompts of one length on longer prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architectures.layout import layout
from ..interventions import Intervention
from ..tasks.examples import Example
from .comparing import Laboratory
from .systems import System, Task

#: Sentences to put before a prompt; they name neither a country nor a person.
_BEFORE = (
    "The rain had stopped by noon.",
    "A small boat crossed the lake while the wind turned to the west.",
    "Nobody remembered who had painted the old wooden door at the end of the lane.",
    "The bakery opened early, and the smell of fresh bread reached the next street.",
)


def longer(examples: list[Example], n_sentences: int) -> list[Example]:
    """The same questions after some unrelated sentences."""
    before = " ".join(_BEFORE[:n_sentences])
    return [replace(example, prompt=f"{before} {example.prompt}") for example in examples] if before else examples


def transfer(lab: Laboratory, task: Task, systems: tuple[System, ...]) -> list[dict[str, Any]]:
    """Held-out figures of systems learned on aligned prompts, one row for each length within the model's context."""
    size, context = lab.size, layout(lab.model).max_context
    rows: list[dict[str, Any]] = []
    for n_sentences in range(0, len(_BEFORE) + 1, 2):
        found: dict[str, list[Any]] = {system.name: [] for system in systems}
        lengths: set[int] = set()
        for seed in size.seeds:
            test = longer(task.examples(lab.tokenizer, size, seed, aligned=True).test, n_sentences)
            lengths |= {len(lab.tokenizer(example.prompt)["input_ids"]) for example in test}
            if context is not None and max(lengths) > context:
                return rows
            interventions: list[Intervention] = [lab.learned(task, system, seed) for system in systems]
            for system, one in zip(systems, lab.measured(test[: size.n_test // 2], interventions), strict=True):
                found[system.name].append(one)
        rows.append({"n_sentences": n_sentences, "lengths": [min(lengths), max(lengths)], "systems": found})
    return rows
