"""The pictures of a report, from its results and the learned interventions."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from .. import plots
from ..interventions import ActivScalar
from ..plots import Measured, PathPoint
from . import recipes
from .claims import effect
from .comparing import Laboratory
from .measuring import jaccard, places
from .systems import SYSTEMS, TASKS, System, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tasks import Example

_METRICS = {
    "flip_to_correct": "correct above wrong, β = +1",
    "flip_to_wrong": "wrong above correct, β = −1",
    "kl": "KL of the other tokens, nats",
    "n_active": "parameters that are not 0",
}


def draw(lab: Laboratory, results: dict[str, Any]) -> None:
    """Draw all pictures into the folder of the report."""
    for task in TASKS:
        _comparison(lab, task, results["comparison"][task.name])
        _maps(lab, task)
        _transfer(lab, task, results["transfer"][task.name])
    _path(lab, results["path"])
    names, sets = [], []
    for task in TASKS:
        for seed in lab.size.seeds:
            names.append(f"{_SHORT[task.name]}, seed {seed}")
            sets.append(set(places(lab.learned(task, SYSTEMS[0], seed))))
    plots.overlap(jaccard(sets), names, lab.folder / "overlap.png", title="Heads that are scaled: seeds and tasks")
    _recipes(lab, results["recipes"])


_SHORT = {"country-capital": "capitals", "indirect-object": "names"}


def _path(lab: Laboratory, found: dict[str, Any]) -> None:
    curves = {task.title: [_point(row, row["n_active"]) for row in found[task.name]] for task in TASKS}
    frozen = {task.title: _point(found[task.name][0]["baseline"], 0) for task in TASKS}
    plots.path(curves, lab.folder / "path.png", kl=True, baseline=frozen)


def _point(row: dict[str, Any], n_active: int) -> PathPoint:
    return PathPoint(n_active, row["flip_to_correct"], row["flip_to_wrong"], row["kl"])


def _recipes(lab: Laboratory, found: dict[str, Any]) -> None:
    """Perplexity against strength; strength 0 is the frozen model."""
    titles = {
        "act-add": f"ActAdd, “{recipes.ADDED}” − “{recipes.SUBTRACTED}”",
        "mean-centring": f"Mean-centring, texts {recipes.TOPIC}",
        "instruction": f"Instruction vector, “{recipes.INSTRUCTION}”",
    }
    for name, title in titles.items():
        rows = [row for row in found[name].get("rows", ()) if row["perplexity"] is not None]
        if not rows:
            continue
        points = ([row["strength"] for row in rows], [row["perplexity"] for row in rows])
        plots.strengths(
            {title: points}, lab.folder / f"{name}.png", ylabel="median perplexity of the continuations", log=True,
            baseline=next((row["perplexity"] for row in rows if row["strength"] == 0), None),
            title=f"{title}, layer {found[name]['layer']}",
        )  # fmt: skip


def _comparison(lab: Laboratory, task: Task, found: dict[str, Any]) -> None:
    rows = []
    for system in sorted(SYSTEMS, key=lambda system: system.aligned):
        name = system.title + (" *" if system.aligned else "")
        for key, metric in _METRICS.items():
            for group, label in (("train", "training"), ("test", "held out")):
                if key == "n_active" and group == "train":
                    continue
                runs = [run[group] for run in found[system.name]]
                frozen = None if key == "n_active" else fmean(run["baseline"][key] for run in runs)
                rows.append(Measured(name, metric, tuple(float(run[key]) for run in runs), label, frozen))
    title = f"{task.title} (* aligned prompts)"
    plots.comparison(rows, lab.folder / f"{task.name}-comparison.png", log=[_METRICS["n_active"]], title=title)


def _maps(lab: Laboratory, task: Task) -> None:
    """The scalars of the first seed: per head, and per site and position with the tokens that all prompts share."""
    seed = lab.size.seeds[0]
    heads, by_position = (system for system in SYSTEMS if system.cls is ActivScalar)
    plots.heatmap(lab.learned(task, heads, seed), lab.folder / f"{task.name}-heads.png", title=task.title)
    train = task.examples(lab.tokenizer, lab.size, seed, aligned=True).train
    plots.heatmap(
        lab.learned(task, by_position, seed), lab.folder / f"{task.name}-positions.png",
        tokens=[slots(lab.tokenizer, example) for example in train], title=task.title,
    )  # fmt: skip


def slots(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The tokens of a prompt, with the names of the answers in their places."""
    answers = {
        tuple(tokenizer.encode(answer, add_special_tokens=False)): name
        for answer, name in ((example.correct, "(correct answer)"), (example.wrong, "(wrong answer)"))
    }
    ids = tokenizer(example.prompt)["input_ids"]
    return [answers.get((i,)) or token for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def _transfer(lab: Laboratory, task: Task, rows: list[Any]) -> None:
    tokens = [row["lengths"][1] for row in rows]
    curves, frozen = {}, []
    for system in transferred():
        runs = [row["systems"][system.name] for row in rows]
        curves[system.title] = (tokens, [[effect(one[seed]) for one in runs] for seed in range(len(lab.size.seeds))])
        frozen = [fmean(effect(one["baseline"]) for one in of_length) for of_length in runs]
    plots.strengths(
        curves, lab.folder / f"{task.name}-transfer.png", xlabel="tokens of the longest prompt", ylim=(0, 1),
        ylabel="steered answer above the other,\nshare of prompts, mean of β = ±1", baseline=(tokens, frozen),
        title=f"{task.title}: longer prompts",
    )  # fmt: skip


def transferred() -> tuple[System, ...]:
    """The systems that are learned on prompts of one length and apply to any length."""
    return tuple(system for system in SYSTEMS if system.aligned and system.cls.shares_positions)
