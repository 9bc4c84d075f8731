"""Several models in turn: a report on each in a folder of its own, and a summary beside them."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._json import parsed
from .blocks import Cell, Column, Document, Section, Table, Text
from .intervals import Interval
from .report import write_document
from .reproducing import reproduce
from .size import Size
from .task_forms import TASKS

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
        ValueError: there are no models, two have the same name, or as `reproduce`.
    """
    root, done = Path(folder), {}
    named = [(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-."), load) for name, load in models]
    if not named:
        raise ValueError("models: got none, expected at least one name with the function that loads it")
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
        for form, found in one["comparison"][task].items():
            for row in found:
                figures = [row[label] for label in _SHOWN]
                cells = [Interval(*cell) if isinstance(cell, list) else cell for cell in figures]
                rows.append([name, form.replace("-", " "), row["system"], *cells])
    columns = [Column("model"), Column("prompts"), Column("system")]
    return Table(f"{task}-summary", [*columns, *(Column(label, form) for label, form in _SHOWN.items())], rows)


#: The columns of the comparison of one model that the summary shows, with the form of their numbers.
_SHOWN = {
    "correct above wrong, β = +1": "{:.2f}", "wrong above correct, β = −1": "{:.2f}", "KL, nats": "{:.3f}",
    "not 0": "{:.0f}", "of": "{:.0f}",
}  # fmt: skip
