"""Puts a report together and writes it: Markdown, HTML, JSON, pictures and CSV files."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import defaults
from .._files import atomic_path
from .._json import write_json
from .._version import __version__
from ..architectures.layout import layout
from . import pictures, tables
from .blocks import Block, Document, Section, Table, Text
from .claims import Claim, judged
from .csv_files import write_csv_files
from .html import as_html
from .intervals import Interval
from .laboratory import Laboratory
from .markdown import as_markdown
from .preface import command_of, moved_sites, preface
from .recipe_sections import recipe_sections
from .stress_tables import left_out, stress_table
from .systems import FEW, SYSTEMS, system_named
from .task_forms import FORMS, TASKS, Task
from .transferring import transferred
from .tuning import TOLERANCE


def write_report(lab: Laboratory, *, quick: bool, seconds: float) -> Path:
    """Write all files of a report, and return the path of report.md."""
    claims = judged(lab.results, [task.name for task in TASKS])
    document = Document(
        f"Activation scaling on {model_name(lab)}",
        [
            Section("What this is", [Text(words) for words in (preface(lab, quick, seconds), *moved_sites(lab))]),
            _claims(lab, claims),
            *(section for task in TASKS for section in _task(lab, task)),
            *_where(lab),
            *_methods(lab),
            *_stress(lab),
            *recipe_sections(lab),
            _how(lab),
        ],
    )
    record = {
        "model": model_name(lab),
        "size": lab.size.to_dict(),
        "claims": [_claim(claim) for claim in claims],
        "comparison": {
            task.name: {
                form: _rows(tables.comparison_table(lab, task, aligned=aligned)) for aligned, form in FORMS.items()
            }
            for task in TASKS
        },
    }
    write_json(lab.folder / "report.json", record)
    return write_document(document, lab.folder)


def write_document(document: Document, folder: Path) -> Path:
    """Write report.md, report.html and the CSV files, and return the path of the first."""
    write_csv_files(document, folder / "csv")
    _write(folder / "report.html", as_html(document))
    return _write(folder / "report.md", as_markdown(document, folder))


def _write(path: Path, text: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _claim(claim: Claim) -> dict[str, Any]:
    return asdict(claim) | {"verdict": claim.verdict, "found": claim.found}


def _rows(table: Table) -> list[dict[str, Any]]:
    """The rows of a table by their columns; a figure with its interval is [value, low, high]."""
    return [
        {
            column.label: list(astuple(cell)) if isinstance(cell, Interval) else cell
            for column, cell in zip(table.columns, row, strict=True)
        }
        for row in table.rows
    ]


def model_name(lab: Laboratory) -> str:
    """The model's name and its shape."""
    found = layout(lab.model)
    name = str(getattr(found.model.config, "name_or_path", "") or found.model_type)
    shape = f"{found.n_layers} layers of {found.n_heads} heads, width {found.hidden_size}"
    return f"{Path(name).name} ({shape})"


def _claims(lab: Laboratory, claims: list[Claim]) -> Section:
    blocks: list[Block] = [
        Text(
            "The criteria are this package's own. Flips: the share of test prompts with the answer that is steered to "
            "above the other, whatever it was before, averaged over both directions. A claim is **held** if the whole "
            "interval of each of its figures is on the right side of the bound, **not held** if the whole interval of "
            "one is on the wrong side, and otherwise not decided."
        ),
        tables.claims_table(claims),
    ]
    tried = tables.remedies_table(lab)
    if tried is not None:
        blocks += [Text(tables.tried_words(lab)), tried]
    return Section("The claims of the abstract", blocks)


def _task(lab: Laboratory, task: Task) -> Iterable[Section]:
    yield Section(task.title, [Text(f"Validation and test prompts have other {task.held_out} than training.")])
    for aligned in (False, True):
        examples = task.examples(lab.tokenizer, lab.size, lab.size.seeds[0], aligned=aligned)
        example = examples.test[0]
        prompt = " ".join(example.prompt.split())
        low, high = lab.results["frozen"][task.name][FORMS[aligned]][0]["lengths"]
        form = "Prompts of one length with aligned tokens" if aligned else "Prompts of any length"
        length = f"{low} tokens" if low == high else f"{low} to {high} tokens"
        blocks: list[Block] = [
            Text(f"{length}, such as `{prompt}` →{example.correct} (correct), not{example.wrong}."),
            Text(f"Equally many steps ({lab.size.steps}), test prompts:"),
            tables.comparison_table(lab, task, aligned=aligned),
            *(Text(words) for words in tables.more_steps_words(lab, task, aligned=aligned)),
        ]
        if lab.size.time_seeds:
            blocks += [
                Text(tables.time_words(lab)),
                tables.comparison_table(lab, task, aligned=aligned, equal_time=True),
                *(Text(words) for words in tables.more_steps_words(lab, task, aligned=aligned, equal_time=True)),
            ]
        yield Section(f"{form}: {task.short}", blocks, level=3)
    yield Section(
        f"Pictures: {task.short}",
        [
            pictures.comparison(lab, task),
            pictures.head_map(lab, task, system_named("scalars")),
            pictures.head_map(lab, task, system_named("few-scalars")),
            *pictures.position_maps(lab, task),
        ],
        level=3,
    )
    knocked = lab.results["knock-out"][task.name]
    yield Section(
        f"Removing one head at a time: {task.short}",
        [Text(_knock_out(knocked)), pictures.knock_out_map(lab, task)], level=3,
    )  # fmt: skip
    longer: list[Block] = [
        Text(
            f"What was learned, on prompts that follow unrelated sentences ({lab.size.n_transferred} test prompts for "
            f"each of {min(lab.size.transfer_seeds, len(lab.size.seeds))} seeds). DynScalar was learned on aligned "
            "prompts, the others on prompts of any length."
        ),
        tables.transfer_table(lab, task, "lengths", transferred()),
    ]
    picture = pictures.transfer(lab, task)
    longer += [] if picture is None else [picture]
    longer += [
        Text(
            "The same questions in other wordings, in which nothing was learned or chosen. The prompts of each "
            f"system have other {task.held_out} than its own training. {task.near}".rstrip()
        ),
        tables.transfer_table(lab, task, "wordings", transferred()),
    ]
    yield Section(f"Other lengths and wordings: {task.short}", longer, level=3)


def _where(lab: Laboratory) -> Iterable[Section]:
    few: list[Block] = [
        Text(
            "Along a path of falling ℓ1 weights each fit starts where the previous one ended; the ℓ1 term also shrinks "
            "the scalars that stay. The refit keeps the scalars that such a path chose and fits them without that term."
        ),
        pictures.path(lab),
        *(tables.path_table(lab, task) for task in TASKS),
    ]
    yield Section("How few scalars suffice", few)
    blocks: list[Block] = []
    for name in ("scalars", "few-scalars"):
        system = system_named(name)
        blocks.append(pictures.overlap(lab, system))
        blocks += [pictures.how_often(lab, task, system) for task in TASKS]
    yield Section("Which heads: stability over seeds and tasks", blocks)


def _methods(lab: Laboratory) -> Iterable[Section]:
    words = (
        f"Methods that choose heads, at equal numbers of heads (`af.compare_heads`): scores on {lab.size.n_scored} "
        "training prompts, the strength on validation prompts, figures on test prompts of the first seed. Methods with "
        "a refit, and activ-scalar, learn a value per head; the others share one strength. Intervals are over the "
        "prompts."
    )
    yield Section("Methods at equal numbers of heads", [Text(words)])
    for task in TASKS:
        blocks: list[Block] = [tables.methods_table(lab, task)]
        picture = pictures.head_methods(lab, task)
        blocks += [] if picture is None else [picture]
        for group in lab.results["heads"][task.name].values():
            blocks += [Text(f"Left out: `{name}`, {reason}.") for name, reason in group["left_out"].items()]
        yield Section(f"Methods: {task.short}", blocks, level=3)


def _stress(lab: Laboratory) -> Iterable[Section]:
    if not lab.size.stressed:
        return
    n = lab.results["stress"][TASKS[0].name][lab.size.stressed[0]]["n_examples"]
    words = (
        f"`af.stress` at strength 1, on {n} test prompts of the first seed: control (flips under changed prompts), "
        "utility (plain text and unrelated prompts) and robustness (the worst change, and unrelated behaviours). A "
        "gate passes if all its checks do. A check is not decided where its interval includes the threshold; a gate "
        "that passes is decided if all its checks are, one that fails if a failed check is."
    )
    yield Section("Stress tests", [Text(words)])
    for task in TASKS:
        notes = [Text(words) for words in left_out(lab, task)]
        yield Section(f"Stress: {task.short}", [stress_table(lab, task), *notes], level=3)


def _knock_out(found: dict[str, Any]) -> str:
    agreement, n_top = found["agreement"], found["n_top"]
    return f"""\
The change of the logit difference when one head at a time is removed ({found["n_examples"]} training prompts) and the \
gradient's prediction at 0 have correlations of {_known(agreement["pearson"], "{:.2f}")} (Pearson) and \
{_known(agreement["spearman"], "{:.2f}")} (Spearman). Of the {n_top} heads with the largest change, \
{found["shared_with_scalars"]} are among the {n_top} largest scalars ({found["expected_by_chance"]:.1f} expected by \
chance); {_known(found["same_sign"], "{:.0%}")} of the active scalars amplify a head that speaks for the correct \
answer or weaken one that speaks against it."""


def _known(value: float | None, form: str) -> str:
    return "(not defined)" if value is None else form.format(value)


def _how(lab: Laboratory) -> Section:
    device = next(lab.model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return Section(
        "How it was run",
        [
            Text(
                f"Settings were tried once, with {lab.size.tuning_steps} steps on the first seed's training prompts: "
                "the defaults, and changes by the factors below. Of those whose flips on the validation prompts are "
                f"within {TOLERANCE} of the best, the one with the smallest KL was chosen. {SYSTEMS[1].title}, takes "
                f"the weight λ_F and the learning rate of {SYSTEMS[0].title}; its scalars are at most {FEW:.0%} of "
                "all, and its number of steps is that of the last fit, after a path of shorter ones that choose them."
            ),
            tables.tuning_table(lab),
            Text(
                f"The margin is {defaults.MARGIN:g} logits; a step takes {lab.size.batch_size} prompts. Seconds per "
                f"fit are those of the {'processors, all threads together' if device.type == 'cpu' else 'clock'}."
            ),
            Text(
                f"`{command_of(lab.size)}`; actscale_fast {__version__}, torch "
                f"{torch.__version__}, {where}, {platform.machine()}, {datetime.now(UTC).date().isoformat()}. The "
                "claims and main figures are also in `report.json`, the data of each table and picture in `csv/`, "
                "those of each stage in `results/`, and the learned interventions in `interventions/`."
            ),
        ],
    )
