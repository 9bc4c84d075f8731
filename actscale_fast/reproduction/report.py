"""Writes `report.md`: the results in words, tables and pictures."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .._files import atomic_path
from .._json import write_json
from .._version import __version__
from ..architectures.layout import layout
from . import recipes
from .claims import judged
from .comparing import Laboratory
from .systems import SYSTEMS, TASKS, Task

_FIGURES = {
    "flip_to_correct": ("correct above wrong, β = +1", "{:.2f}"),
    "flip_to_wrong": ("wrong above correct, β = −1", "{:.2f}"),
    "kl": ("KL, nats", "{:.3f}"),
    "top1": ("top other token kept", "{:.2f}"),
    "n_active": ("not 0", "{:.0f}"),
    "n_parameters": ("of", "{:.0f}"),
    "n_places": ("vectors changed", "{:.0f}"),
    "l1": ("ℓ1", "{:.1f}"),
}
_VERDICT = {True: "**yes**", False: "**no**", None: "not tested"}
_RECIPES = {
    "act-add": f"ActAdd: {recipes.ADDED} − {recipes.SUBTRACTED}",
    "mean-centring": f"Mean-centring: texts {recipes.TOPIC}",
    "instruction": f"Instruction steering: {recipes.INSTRUCTION.strip('.').lower()}",
}


def write_report(lab: Laboratory, results: dict[str, Any], *, quick: bool, seconds: float) -> Path:
    """Write report.json and report.md, and return the path of the latter."""
    claims = judged(results, [task.name for task in TASKS])
    write_json(lab.folder / "report.json", {"claims": [asdict(claim) for claim in claims], **results})
    verdicts = _table(
        ("claim", "criterion", "measured", "held"),
        ((claim.claim, claim.criterion, claim.found, _VERDICT[claim.held]) for claim in claims),
    )
    text = f"""\
# Activation scaling on {_name(lab)}

{_preface(lab, quick, seconds)}

## The claims of the abstract

The criteria are this package's own, and so are all weights and learning rates, which were chosen by the results of \
SmolLM2-135M-Instruct on prompts of seed 0, including held-out ones. Flips: the share of held-out prompts with the \
answer that is steered to, whatever it was before, averaged over both directions.

{verdicts}

{"".join(_task(lab, task, results) for task in TASKS)}\
## How few scalars suffice

The weight of the ℓ1 norm decreases along a path, and each fit starts where the previous one ended. Held-out prompts.

![share flipped against active scalars](path.png)

## Which heads: overlap between seeds and tasks

Jaccard index |A ∩ B| / |A ∪ B| of the sets of heads whose scalar is not 0. The seed also determines what is held out.

![overlap](overlap.png)

## Systems without training examples

Greedy continuations at several strengths. Perplexity is that of the continuation under the frozen model, as the \
median over prompts.

{"".join(_recipe(name, title, results["recipes"][name]) for name, title in _RECIPES.items())}\
{_latent(results["recipes"]["latent"])}
{_how(lab, quick)}"""
    path = lab.folder / "report.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _name(lab: Laboratory) -> str:
    found = layout(lab.model)
    name = str(getattr(found.model.config, "name_or_path", "") or found.model_type)
    shape = f"{found.n_layers} layers of {found.n_heads} heads, width {found.hidden_size}"
    return f"{Path(name).name} ({shape})"


def _preface(lab: Laboratory, quick: bool, seconds: float) -> str:
    size, n = lab.size, len(lab.size.seeds)
    shortened = "**A quick run: one seed (so no spread), and fewer prompts and steps than the full report.** "
    return f"""\
{shortened if quick else ""}{n} seed{"s" if n > 1 else ""}, for the order of training and what is held out; \
{size.n_train} training and {size.n_test} held-out prompts per task; {round(seconds / 60)} minutes in total. The \
method is that of arXiv 2410.04962. The hinge, the direction of the KL, the exclusion of the answers and all weights \
are choices of `actscale_fast`. No figure from the paper is used."""


def _task(lab: Laboratory, task: Task, results: dict[str, Any]) -> str:
    found = results["comparison"][task.name]
    rows = [
        (
            system.title,
            *_cells([run["train"] for run in found[system.name]])[:4],
            _spread([run["seconds"] for run in found[system.name]], "{:.0f}"),
        )
        for system in SYSTEMS
    ]
    return f"""\
## {task.title}

Held out: {task.held_out}. Mean (range over seeds).

{_form(lab, task, results, aligned=False)}

{_form(lab, task, results, aligned=True)}

On training prompts (the first {lab.size.n_test // 2} of them):

{_table(("training", *(label for label, _ in list(_FIGURES.values())[:4]), "seconds per fit"), rows)}

![systems]({task.name}-comparison.png)

Scalars of seed {lab.size.seeds[0]}: per head, and per site and position.

![heads]({task.name}-heads.png)

![positions]({task.name}-positions.png)

{_knock_out(results["knock-out"][task.name])}

![knock-outs]({task.name}-knock-out.png)

DynScalar, learned on prompts of one length, evaluated on prompts that follow unrelated sentences \
({lab.size.n_test // 2} held-out prompts per seed):

{_transfer(results["transfer"][task.name])}

![transfer]({task.name}-transfer.png)

"""


def _form(lab: Laboratory, task: Task, results: dict[str, Any], *, aligned: bool) -> str:
    """The table of held-out results on one form of the task, with the frozen model on the same prompts."""
    systems = [system for system in SYSTEMS if system.aligned is aligned]
    found = results["comparison"][task.name]
    example = task.examples(lab.tokenizer, lab.size, lab.size.seeds[0], aligned=aligned).test[0]
    rows = [("frozen model", *_cells([_frozen(run["test"]) for run in found[systems[0].name]]))]
    rows += [(system.title, *_cells([run["test"] for run in found[system.name]])) for system in systems]
    if not aligned:  # baselines of the scalars per head
        baselines = results["baselines"][task.name]
        rows.append(("learned scalars at random heads", *_cells([run["random"] for run in baselines])))
        rows.append(("scalars from the gradient at 0", *_cells([run["attribution"] for run in baselines])))
    form = "Prompts of one length with aligned tokens" if aligned else "Prompts of any length"
    return f"""\
{form}, such as `{_plain(example.prompt)}` →{example.correct} (correct), not{example.wrong}:

{_table(("held out", *(label for label, _ in _FIGURES.values())), rows)}"""


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


def _transfer(rows: list[Any]) -> str:
    table = []
    for row in rows:
        (runs,) = row["systems"].values()
        first, last = row["lengths"]
        flips = [
            _spread([(run["baseline"] if frozen else run)[key] for run in runs], "{:.2f}")
            for key in ("flip_to_correct", "flip_to_wrong")
            for frozen in (True, False)
        ]
        length = f"{first}" if first == last else f"{first}–{last}"
        table.append((f"{row['n_sentences']}", length, *flips, _spread([run["kl"] for run in runs], "{:.3f}")))
    head = ("sentences before", "tokens", "correct: frozen", "β = +1", "wrong: frozen", "β = −1", "KL, nats")
    return _table(head, table)


def _recipe(name: str, title: str, recipe: dict[str, Any]) -> str:
    """A recipe's continuations of two prompts at several strengths."""
    if "impossible" in recipe:
        return f"### {title}\n\nNot possible here: {recipe['impossible']}\n\n"
    parts = [f"### {title} (layer {recipe['layer']}, coefficient {recipe['coefficient']:.3g})"]
    for number in range(min(2, len(recipe["prompts"]))):
        rows = []
        for row in recipe["rows"]:
            fluency = "—" if row["perplexity"] is None else f"{row['perplexity']:.1f}"
            share = f"{row['share']:.0%}" if "share" in row else ""
            rows.append((f"{row['strength']:g}", _plain(row["texts"][number]), fluency, share))
        parts.append(f"`{_plain(recipe.get('shown', recipe['prompts'])[number])}`")
        parts.append(_table(("strength", "continuation", "perplexity, all prompts", recipe.get("measured", "")), rows))
    parts.append(f"![perplexity]({name}.png)")
    if "table" in recipe:
        tried = ", ".join(f"{layer}: {score:.2f}" for layer, score, _ in recipe["table"])
        parts.append(f"Score of each candidate layer on validation questions: {tried}.")
    return "\n\n".join(parts) + "\n\n"


def _latent(found: dict[str, Any]) -> str:
    if "impossible" in found:
        return f"### Latent steering vectors\n\nNot possible here: {found['impossible']}\n"
    exact = sum(row["exact"] for row in found["rows"])
    rows = ((row["sentence"], _plain(row["said"]), "✓" if row["exact"] else "✗") for row in found["rows"])
    return f"""\
### Latent steering vectors (layer {found["layer"]})

{exact} of {len(found["rows"])} sentences are reproduced word by word under their vector.

{_table(("sentence", "said", ""), rows)}
"""


def _how(lab: Laboratory, quick: bool) -> str:
    device = next(lab.model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = [
        (
            system.title, ", ".join(system.sites), f"{round(system.share * lab.size.steps)}", f"{system.lr:g}",
            f"{system.objective.margin:g}", f"{system.objective.faithfulness:g}",
            f"{system.objective.minimality_weight:g}",
        )
        for system in SYSTEMS
    ]  # fmt: skip
    return f"""\
## How it was run

{_table(("system", "sites", "steps", "learning rate", "margin", "λ_F", "λ_M"), rows)}

`actscale-fast reproduce{" --quick" if quick else ""}`; actscale_fast {__version__}, torch {torch.__version__}, \
{where}, {platform.machine()}, {datetime.now(UTC).date().isoformat()}. All figures are in `report.json`, \
those of each stage in `results/`, and the learned interventions in `interventions/`.
"""


def _frozen(figures: dict[str, Any]) -> dict[str, Any]:
    nothing = {"n_active": 0, "n_places": 0, "l1": 0.0, "n_parameters": figures["n_parameters"]}
    return figures["baseline"] | nothing


def _cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [_spread([run[name] for run in runs], form) for name, (_, form) in _FIGURES.items()]


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(value) for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", "∣") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *escaped))


def _plain(text: str) -> str:
    return " ".join(text.split())
