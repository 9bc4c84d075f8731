"""`report.md`: the results in words, tables and pictures."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .._files import atomic_path
from .._json import write_json
from .._version import __version__
from ..architectures.layout import layout
from .claims import judged
from .comparing import Laboratory
from .settings import SYSTEMS, TASKS, Task

_FIGURES = {
    "flip_to_correct": ("correct, β = +1", "{:.2f}"),
    "flip_to_wrong": ("wrong, β = −1", "{:.2f}"),
    "kl": ("KL, nats", "{:.3f}"),
    "top1": ("top other token kept", "{:.2f}"),
    "n_active": ("not 0", "{:.0f}"),
    "n_parameters": ("of", "{:.0f}"),
    "n_places": ("vectors changed", "{:.0f}"),
    "l1": ("ℓ1", "{:.1f}"),
}
_VERDICT = {True: "**yes**", False: "**no**", None: "not tested"}
_RECIPES = {
    "act-add": "ActAdd: Love − Hate",
    "mean-centring": "Mean-centring: texts about the sea",
    "instruction": "Instruction steering: answer with a poem",
}


def write_report(lab: Laboratory, results: dict[str, Any], *, quick: bool, seconds: float) -> Path:
    """Write report.json and report.md; the path of the latter."""
    claims = judged(results, [task.name for task in TASKS])
    verdicts = [{"claim": c.claim, "criterion": c.criterion, "found": c.found, "held": c.held} for c in claims]
    write_json(lab.folder / "report.json", {"claims": verdicts, **results})
    lines = [
        f"# Activation scaling on {_name(lab)}",
        "",
        _preface(lab, quick, seconds),
        "",
        "## The claims of the abstract",
        "",
        "The criteria are this package's; so are all weights and rates, chosen by what SmolLM2-135M-Instruct gave on "
        "prompts of seed 0, held-out ones among them. Flips: the mean over both directions of the share of held-out "
        "prompts whose answer is the one steered to, whatever it was before.",
        "",
        *_table(
            ("claim", "taken to hold where", "measured", "held"),
            ((c.claim, c.criterion, c.found, _VERDICT[c.held]) for c in claims),
        ),
    ]
    for task in TASKS:
        lines += _task(lab, task, results)
    lines += [
        "",
        "## How few suffice",
        "",
        "The weight of the ℓ1 norm falls along a path; each fit starts where the one before ended. Held-out prompts.",
        "",
        "![share flipped against active scalars](path.png)",
        "",
        "## Where they are: overlap of seeds and tasks",
        "",
        "The sets of heads whose scalar is not 0, |A ∩ B| / |A ∪ B|; the seed also chooses what is held out.",
        "",
        "![overlap](overlap.png)",
        "",
        *_recipes(results["recipes"]),
        "",
        *_how(lab, quick),
    ]
    path = lab.folder / "report.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _name(lab: Laboratory) -> str:
    found = layout(lab.model)
    name = str(getattr(found.model.config, "name_or_path", "") or found.model_type)
    shape = f"{found.n_layers} layers of {found.n_heads} heads, width {found.hidden_size}"
    return f"{Path(name).name} ({shape})"


def _preface(lab: Laboratory, quick: bool, seconds: float) -> str:
    size = lab.size
    n = len(size.seeds)
    text = (
        f"{n} seed{'s' if n > 1 else ''}, which choose the order of training and what is held out; {size.n_train} "
        f"training prompts a task, {size.n_test} held-out prompts. {round(seconds / 60)} "
        "minutes in all."
    )
    if quick:
        text = "**A quick run: one seed, fewer prompts and steps than the full report; no spread can be told.** " + text
    return text + (
        " The method is that of arXiv 2410.04962 as `actscale_fast` reads it: hinge, direction of the KL, exclusion of "
        "the answers and all weights are this package's choices, and no figure of the paper is known to it."
    )


def _task(lab: Laboratory, task: Task, results: dict[str, Any]) -> list[str]:
    found = results["comparison"][task.name]
    return [
        "",
        f"## {task.title}",
        "",
        f"Held out are {task.held_out}. Mean (least to largest over seeds).",
        *_form(lab, task, results, aligned=False),
        *_form(lab, task, results, aligned=True),
        "",
        f"On training prompts (the first {lab.size.n_test // 2} of them):",
        "",
        *_table(
            ("training", *(label for label, _ in list(_FIGURES.values())[:4]), "seconds of a fit"),
            [
                (
                    system.title,
                    *_cells([run["train"] for run in found[system.name]])[:4],
                    _spread([run["seconds"] for run in found[system.name]], "{:.0f}"),
                )
                for system in SYSTEMS
            ],
        ),
        "",
        f"![systems]({task.name}-comparison.png)",
        "",
        f"Scalars of seed {lab.size.seeds[0]}: a head each, and a site and position each.",
        "",
        f"![heads]({task.name}-heads.png)",
        "",
        f"![positions]({task.name}-positions.png)",
        "",
        *_knock_out(task, results["knock-out"][task.name]),
        "",
        *_transfer(lab, task, results["transfer"][task.name]),
    ]


def _form(lab: Laboratory, task: Task, results: dict[str, Any], *, aligned: bool) -> list[str]:
    """The held-out table of one form of the task, with the frozen model on the same prompts."""
    systems = [system for system in SYSTEMS if system.aligned is aligned]
    found = results["comparison"][task.name]
    example = task.examples(lab.tokenizer, lab.size, lab.size.seeds[0], aligned=aligned).test[0]
    rows = [("frozen model", *_cells([_frozen(run["test"]) for run in found[systems[0].name]]))]
    rows += [(system.title, *_cells([run["test"] for run in found[system.name]])) for system in systems]
    if not aligned:  # those of the scalars of a head each
        baselines = results["baselines"][task.name]
        rows.append(("learned scalars at random heads", *_cells([run["random"] for run in baselines])))
        rows.append(("scalars from the gradient at 0", *_cells([run["attribution"] for run in baselines])))
    form = "Prompts of one length, whose tokens are aligned" if aligned else "Prompts of any length"
    return [
        "",
        f"{form}, such as `{_plain(example.prompt)}` →{example.correct} (correct), not{example.wrong}:",
        "",
        *_table(("held out", *(label for label, _ in _FIGURES.values())), rows),
    ]


def _knock_out(task: Task, found: dict[str, Any]) -> list[str]:
    agreement = found["agreement"]
    pearson, spearman = (_known(agreement[name], "{:.2f}") for name in ("pearson", "spearman"))
    return [
        f"Removing one head at a time ({found['n_examples']} training prompts) changes the logit difference as the "
        f"gradient at 0 predicts with Pearson {pearson}, Spearman {spearman}. Of the "
        f"{found['n_top']} heads that matter most to it, {found['shared_with_scalars']} are among the {found['n_top']} "
        f"largest scalars ({found['expected_by_chance']:.1f} expected by chance); "
        f"{_known(found['same_sign'], '{:.0%}')} of the active scalars amplify what speaks for the correct answer, or "
        "weaken what speaks against it.",
        "",
        f"![knock-outs]({task.name}-knock-out.png)",
    ]


def _known(value: float | None, form: str) -> str:
    return "(not defined)" if value is None else form.format(value)


def _transfer(lab: Laboratory, task: Task, rows: list[Any]) -> list[str]:
    table = []
    for row in rows:
        (runs,) = row["systems"].values()
        first, last = row["lengths"]
        table.append(
            (
                f"{row['n_sentences']}",
                f"{first}" if first == last else f"{first}–{last}",
                _spread([run["baseline"]["flip_to_correct"] for run in runs], "{:.2f}"),
                _spread([run["flip_to_correct"] for run in runs], "{:.2f}"),
                _spread([run["baseline"]["flip_to_wrong"] for run in runs], "{:.2f}"),
                _spread([run["flip_to_wrong"] for run in runs], "{:.2f}"),
                _spread([run["kl"] for run in runs], "{:.3f}"),
            )
        )
    return [
        "DynScalar, learned on prompts of one length, on prompts that follow sentences of another subject "
        f"({lab.size.n_test // 2} held-out prompts a seed):",
        "",
        *_table(
            ("sentences before", "tokens", "correct: frozen", "β = +1", "wrong: frozen", "β = −1", "KL, nats"), table
        ),
        "",
        f"![transfer]({task.name}-transfer.png)",
    ]


def _recipes(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Systems that are not fitted to a task",
        "",
        "Greedy continuations at several strengths; perplexity is that of the continuation under the frozen model, the "
        "median over prompts.",
    ]
    for name, title in _RECIPES.items():
        recipe = found[name]
        if "impossible" in recipe:
            lines += ["", f"### {title}", "", f"Not possible here: {recipe['impossible']}"]
            continue
        lines += ["", f"### {title} (layer {recipe['layer']}, coefficient {recipe['coefficient']:.3g})", ""]
        for number in range(min(2, len(recipe["prompts"]))):
            rows = []
            for row in recipe["rows"]:
                judged_as = "—" if row["perplexity"] is None else f"{row['perplexity']:.1f}"
                share = f"{row['share']:.0%}" if "share" in row else ""
                rows.append((f"{row['strength']:g}", _plain(row["texts"][number]), judged_as, share))
            lines += [
                f"`{_plain(recipe.get('shown', recipe['prompts'])[number])}`",
                "",
                *_table(("strength", "continuation", "perplexity, all prompts", recipe.get("measured", "")), rows),
                "",
            ]
        lines += [f"![perplexity]({name}.png)"]
        if "table" in recipe:
            tried = ", ".join(f"{layer}: {score:.2f}" for layer, score, _ in recipe["table"])
            lines += ["", f"Layers tried on validation questions, with the score of each: {tried}."]
    latent = found["latent"]
    if "impossible" in latent:
        return [*lines, "", "### Latent steering vectors", "", f"Not possible here: {latent['impossible']}"]
    exact = sum(row["exact"] for row in latent["rows"])
    lines += [
        "",
        f"### Latent steering vectors (layer {latent['layer']})",
        "",
        f"{exact} of {len(latent['rows'])} sentences are said word by word when their vector is added.",
        "",
        *_table(
            ("sentence", "said", ""),
            ((row["sentence"], _plain(row["said"]), "✓" if row["exact"] else "✗") for row in latent["rows"]),
        ),
    ]
    return lines


def _how(lab: Laboratory, quick: bool) -> list[str]:
    device = next(lab.model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    date = datetime.now(UTC).date().isoformat()
    rows = [
        (
            system.title, ", ".join(system.sites), f"{round(system.share * lab.size.steps)}", f"{system.lr:g}",
            f"{system.objective.margin:g}", f"{system.objective.faithfulness:g}", f"{system.objective.minimality:g}",
        )
        for system in SYSTEMS
    ]  # fmt: skip
    return [
        "## How it was run",
        "",
        *_table(("system", "sites", "steps", "learning rate", "margin", "λ_F", "λ_M"), rows),
        "",
        f"`actscale-fast reproduce{' --quick' if quick else ''}`; actscale_fast {__version__}, torch "
        f"{torch.__version__}, {where}, {platform.machine()}, {date}. All figures are in `report.json`, each "
        "stage's in `results/`, the learned interventions in `interventions/`.",
    ]


def _frozen(figures: dict[str, Any]) -> dict[str, Any]:
    nothing = {"n_active": 0, "n_places": 0, "l1": 0.0, "n_parameters": figures["n_parameters"]}
    return figures["baseline"] | nothing


def _cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [_spread([run[name] for run in runs], form) for name, (_, form) in _FIGURES.items()]


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(value) for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *(f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in rows),
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())
