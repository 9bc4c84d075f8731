"""Several models in turn: a report on each in a folder of its own, and a summary beside them."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .._json import parsed
from .blocks import Cell, Column, Document, Section, Table, Text
from .claims import tests
from .intervals import mean
from .report import write_document
from .reproducing import reproduce
from .size import Size
from .systems import SYSTEMS
from .tables import BASELINES
from .task_forms import FORMS, TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The models of arXiv 2410.04962, by their names on the Hugging Face hub.
PAPER_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "EleutherAI/pythia-1.4b")

Load = Callable[[], "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


def reproduce_models(
    models: Iterable[tuple[str, Load]], folder: str | os.PathLike[str], *, quick: bool = False,
    size: Size | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Run `reproduce` on several models, one after another, and write a summary of all.

    Args:
        models: for each model its name, and a function that loads it with its tokenizer; one is in memory at a time.
        folder: output folder, with a folder per model in it.
        quick, size, progress: as in `reproduce`.

    Returns:
        The path of the summary, `report.md`; `report.html` is beside it.

    Raises:
        ValueError: two models have the same name, or as `reproduce`.
    """
    root, done = Path(folder), {}
    named = [(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-."), load) for name, load in models]
    twice = next((name for name, _ in named if [other for other, _ in named].count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"models: got {twice!r} more than once, expected different names")
    for name, load in named:
        model, tokenizer = load()
        reproduce(model, tokenizer, root / name, quick=quick, size=size, progress=progress)
        del model, tokenizer
        gc.collect()
        done[name] = parsed((root / name / "report.json").read_bytes(), finite=False)
        summary = write_document(_summary(done), root)  # after each model, so that an interrupted run has one too
    return summary


def _summary(done: dict[str, Any]) -> Document:
    """The claims and the main figures of all models, with links to their reports."""
    links = ", ".join(f"[{one['model']}]({name}/report.md)" for name, one in done.items())
    sections = [
        Section("The models", [Text(f"Each has a report of its own: {links}.")]),
        Section("The claims of the abstract", [_claims(done)]),
    ]
    for task in TASKS:
        sections.append(Section(task.title, [_figures(done, task.name)]))
    return Document(f"Activation scaling on {len(done)} model{'s' * (len(done) > 1)}", sections)


def _claims(done: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for place, claim in enumerate(next(iter(done.values()))["claims"]):
        verdicts = [one["claims"][place]["verdict"] for one in done.values()]
        rows.append([claim["claim"], claim["task"], claim["form"], *verdicts])
    columns = [Column("claim"), Column("task"), Column("form"), *(Column(name) for name in done)]
    return Table("claims", columns, rows)


def _figures(done: dict[str, Any], task: str) -> Table:
    rows: list[list[Cell]] = []
    for name, one in done.items():
        runs = one["results"]["comparison"][task]
        for aligned, form in ((False, "any length"), (True, "aligned")):
            systems = [system for system in SYSTEMS if system.aligned is aligned]
            still = [run["test"]["frozen"] for run in runs[systems[0].name]]
            baselines = one["results"]["baselines"][task][FORMS[aligned]]
            rows.append([name, form, "frozen model", *(mean([run[key] for run in still]) for key in _SHOWN), 0.0, None])
            named = {system.title: tests(runs[system.name]) for system in systems}
            named |= {title: tests([run[key] for run in baselines]) for key, title in BASELINES.items()}
            for title, records in named.items():
                figures = [mean([record[key] for record in records]) for key in _SHOWN]
                n_active = fmean(record["n_active"] for record in records)
                rows.append([name, form, title, *figures, n_active, records[0]["n_parameters"]])
    columns = [
        Column("model"), Column("prompts"), Column("system"), Column("correct above wrong, β = +1"),
        Column("wrong above correct, β = −1"), Column("KL, nats", "{:.3f}"), Column("not 0", "{:.0f}"),
        Column("of", "{:.0f}"),
    ]  # fmt: skip
    return Table(f"{task}-summary", columns, rows)


_SHOWN = ("correct", "wrong", "kl")
