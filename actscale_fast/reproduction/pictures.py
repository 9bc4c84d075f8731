"""The pictures of a report, from its results and the learned interventions."""

from __future__ import annotations

from typing import Any

from .. import plots
from ..interventions import ActivScalar
from ..plots import Measured, PathPoint
from .claims import effect
from .comparing import Laboratory
from .measuring import jaccard, places
from .systems import SYSTEMS, TASKS, System, Task

_METRICS = {
    "flip_to_correct": "flipped to correct",
    "flip_to_wrong": "flipped to wrong",
    "kl": "KL, nats",
    "n_active": "not 0",
}


def draw(lab: Laboratory, results: dict[str, Any]) -> None:
    """Draw all pictures into the folder of the report."""
    for task in TASKS:
        _comparison(lab, task, results["comparison"][task.name])
        _maps(lab, task)
        _transfer(lab, task, results["transfer"][task.name])
    curves = {
        task.title: [
            PathPoint(row["n_active"], row["flip_to_correct"], row["flip_to_wrong"], row["kl"])
            for row in results["path"][task.name]
        ]
        for task in TASKS
    }
    plots.path(curves, lab.folder / "path.png", kl=True)
    names, sets = [], []
    for task in TASKS:
        for seed in lab.size.seeds:
            names.append(f"{_SHORT[task.name]} {seed}")
            sets.append(set(places(lab.learned(task, SYSTEMS[0], seed))))
    plots.overlap(jaccard(sets), names, lab.folder / "overlap.png", title="Heads that are scaled: seeds and tasks")
    for name, label in (("act-add", "ActAdd"), ("mean-centring", "mean-centring"), ("instruction", "instruction")):
        rows = [row for row in results["recipes"][name].get("rows", ()) if row["perplexity"] is not None]
        if not rows:
            continue
        points = ([row["strength"] for row in rows], [row["perplexity"] for row in rows])
        plots.strengths({label: points}, lab.folder / f"{name}.png", ylabel="perplexity, median", log=True)


_SHORT = {"country-capital": "capitals", "indirect-object": "names"}


def _comparison(lab: Laboratory, task: Task, found: dict[str, Any]) -> None:
    rows = []
    for system in sorted(SYSTEMS, key=lambda system: system.aligned):
        name = system.title + (" *" if system.aligned else "")
        for key, metric in _METRICS.items():
            for group, label in (("train", "training"), ("test", "held out")):
                if key == "n_active" and group == "train":
                    continue
                values = tuple(float(run[group][key]) for run in found[system.name])
                rows.append(Measured(name, metric, values, label))
    title = f"{task.title} (* aligned prompts)"
    plots.comparison(rows, lab.folder / f"{task.name}-comparison.png", log=[_METRICS["n_active"]], title=title)


def _maps(lab: Laboratory, task: Task) -> None:
    """The scalars of the first seed: per head, and per site and position with the tokens of one prompt."""
    seed = lab.size.seeds[0]
    heads, by_position = (system for system in SYSTEMS if system.cls is ActivScalar)
    plots.heatmap(lab.learned(task, heads, seed), lab.folder / f"{task.name}-heads.png", title=task.title)
    prompt = task.examples(lab.tokenizer, lab.size, seed, aligned=True).train[0].prompt
    tokens = lab.tokenizer.convert_ids_to_tokens(lab.tokenizer(prompt)["input_ids"])
    plots.heatmap(
        lab.learned(task, by_position, seed), lab.folder / f"{task.name}-positions.png", tokens=tokens, title=task.title
    )


def _transfer(lab: Laboratory, task: Task, rows: list[Any]) -> None:
    curves = {}
    for system in transferred():
        values = [[effect(row["systems"][system.name][seed]) for row in rows] for seed in range(len(lab.size.seeds))]
        curves[system.title] = ([row["lengths"][1] for row in rows], values)
    plots.strengths(
        curves, lab.folder / f"{task.name}-transfer.png", ylabel="share flipped, mean of both directions",
        xlabel="tokens of the longest prompt", title=task.title,
    )  # fmt: skip


def transferred() -> tuple[System, ...]:
    """The systems that are learned on prompts of one length and apply to any length."""
    return tuple(system for system in SYSTEMS if system.aligned and system.cls.shares_positions)
