"""What is tried where a claim is not held or not decided: more steps, a refit without ℓ1, scalars per position."""

from __future__ import annotations

from typing import Any

from .laboratory import Laboratory
from .systems import FEW, few_of, system_named
from .task_forms import Task

#: Three times the steps of the comparison.
MORE = 3

#: By the kind of claim: (what is tried, the system, factor on the steps, how many scalars may be active).
REMEDIES: dict[str, tuple[tuple[str, str, float, str], ...]] = {
    "per head": (
        ("more steps", "scalars", MORE, ""),
        ("refit of its own scalars", "scalars", 1, "own"),
    ),
    "per position": (
        ("more steps", "scalars-by-position", MORE, ""),
        ("refit of its own scalars", "scalars-by-position", 1, "own"),
    ),
    "few": (
        ("more steps and refit", "few-scalars", MORE, "few"),
        (f"{FEW:.0%} of the vectors per site and position, refit", "scalars-by-position", 1, "few"),
    ),
}


def attempted(lab: Laboratory, task: Task, kind: str, number: int) -> dict[str, Any]:
    """One attempt on the first seeds, measured on their test prompts."""
    what, name, factor, active = REMEDIES[kind][number]
    system, steps = system_named(name), round(lab.size.steps * factor)
    runs: list[dict[str, Any]] = []
    taken: list[int] = []
    for place, seed in enumerate(lab.size.seeds[: lab.size.remedy_seeds]):
        splits = task.examples(lab.tokenizer, lab.size, seed, aligned=system.aligned)
        intervention = lab.new(task, system, seed)
        n_active = None
        if active == "own":
            n_active = max(int(lab.results["comparison"][task.name][name][place]["test"]["n_active"]), 1)
        if active == "few":
            n_active = few_of(intervention)
        made = lab.fitted(splits.train, intervention, lab.settings(task, system), seed, steps, n_active=n_active)
        taken.append(made["steps"])
        runs += lab.measured(splits.test, [intervention])
    return {"what": what, "system": name, "steps": max(taken), "runs": runs}
