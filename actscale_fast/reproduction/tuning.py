"""The weights of each system and its learning rate, chosen once on the first seed's validation prompts."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from .. import defaults
from ..interventions import ActivScalar
from .laboratory import Laboratory
from .systems import System
from .task_forms import Task

#: Settings may flip this much less than the best of the grid; of those, the one with the smallest KL is chosen.
TOLERANCE = 0.02


def tried(lab: Laboratory, task: Task, system: System, number: int) -> dict[str, Any]:
    """One point of the grid: a short fit on the first seed's training prompts, measured on its validation prompts."""
    size, seed = lab.size, lab.size.seeds[0]
    settings = _settings(lab, task, system, number)
    splits = task.examples(lab.tokenizer, size, seed, aligned=system.aligned)
    intervention = lab.new(task, system, seed)
    made = lab.fitted(splits.train, intervention, settings, seed, size.tuning_steps)
    (record,) = lab.measured(splits.validation, [intervention])
    return {
        "settings": settings | {"minimality": made["minimality"]},
        "flips": (fmean(record["correct"]) + fmean(record["wrong"])) / 2,
        "kl": fmean(record["kl"]),
        "n_active": record["n_active"],
        "seconds": made["seconds"],
    }


def chosen(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings with the smallest KL among those that flip nearly as much as the best."""
    best = max(point["flips"] for point in points)
    near = [point for point in points if point["flips"] >= best - TOLERANCE]
    settings: dict[str, Any] = min(near, key=lambda point: point["kl"])["settings"]
    return settings


def _settings(lab: Laboratory, task: Task, system: System, number: int) -> dict[str, Any]:
    """The defaults times the factors of a point; the first point turns the share of λ_max into a number."""
    faithfulness, minimality, rate = lab.size.grid[number]
    share = defaults.MINIMALITY if issubclass(system.cls, ActivScalar) else defaults.VECTOR_MINIMALITY
    weight: Any = share
    if number:
        first = lab.results["tuning"][task.name][system.name]["points"][0]["settings"]["minimality"]
        weight = first * minimality
    lr = f"{float(defaults.LR.rstrip('%')) * rate:g}%"
    return {"faithfulness": defaults.FAITHFULNESS * faithfulness, "minimality": weight, "lr": lr}
