"""The pictures of a report, each with the table of what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from .. import plots
from ..interventions import ActivScalar
from ..plots import Measured, PathPoint
from . import recipes
from .blocks import Cell, Column, HeadMap, Picture, Table
from .claims import tests
from .html import embedded_svg
from .laboratory import Laboratory
from .measuring import jaccard, places
from .systems import SYSTEMS, System, system_named
from .tables import BASELINES
from .task_forms import FORMS, TASKS, Task
from .transferring import transferred

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from ..tasks import Example

_METRICS = {
    "correct": "correct, β = +1",
    "wrong": "wrong, β = −1",
    "top": "top token",
    "kl": "KL, nats",
    "n_active": "not 0",
}
_FLIPS = "steered answer above the other,\nshare of prompts, mean of β = ±1"


def _kept(lab: Laboratory, figure: Figure, name: str, caption: str, data: Table) -> Picture:
    """Keep a figure as PNG for Markdown and as SVG for HTML."""
    file = _file(lab, name)
    figure.savefig(file, facecolor=figure.get_facecolor())
    vector = lab.folder / "work" / f"{name}.svg"
    embedded_svg(figure, vector)
    return Picture(file, caption, data, vector)


def _of(record: dict[str, Any], key: str) -> float:
    if key == "top":
        return fmean([*record["top_correct"], *record["top_wrong"]])
    return float(record[key]) if key == "n_active" else fmean(record[key])


def comparison(lab: Laboratory, task: Task) -> Picture:
    """All systems and baselines on the test prompts, with the frozen model."""
    found = dict(lab.results["comparison"][task.name])
    titles = {system.name: system.title + " *" * system.aligned for system in SYSTEMS}
    for aligned, form in FORMS.items():
        for name, title in BASELINES.items():
            key = f"{name}-{form}"
            found[key] = [run[name] for run in lab.results["baselines"][task.name][form]]
            titles[key] = title + " *" * aligned
    order = sorted(titles, key=lambda name: titles[name].endswith("*"))
    rows, data = [], []
    for name in order:
        for key, metric in _METRICS.items():
            values = tuple(_of(record, key) for record in tests(found[name]))
            still = None if key == "n_active" else fmean(_of(record["frozen"], key) for record in tests(found[name]))
            rows.append(Measured(titles[name], metric, values, baseline=still))
            data += [[titles[name], metric, lab.size.seeds[seed], value, still] for seed, value in enumerate(values)]
    columns = [Column(label, "{}") for label in ("system", "figure", "seed", "value", "frozen model")]
    name = f"{task.name}-comparison"
    title = f"{task.title}: test prompts (* aligned)"
    figure = plots.comparison(rows, log=[_METRICS["n_active"]], title=title)
    caption = (
        "Mean and range over seeds; the upright line is the frozen model on the same prompts. From the left: the "
        "answer steered to is above the other, in each direction; it is the top token, mean of both; the KL of the "
        "other tokens; how many parameters are not 0."
    )
    return _kept(lab, figure, name, caption, Table(f"{name}-picture", columns, data))


def head_map(lab: Laboratory, task: Task, system: System) -> HeadMap:
    """The scalars per head of the first seed."""
    seed = lab.size.seeds[0]
    scalars = lab.learned(task, system, seed)
    assert isinstance(scalars, ActivScalar)
    name = f"{task.name}-{system.name}-map"
    file = _file(lab, name)
    plots.heatmap(scalars, file, title=f"{task.title}: {system.title}")
    values = scalars.alpha.detach()[:, 0].float().cpu()
    caption = f"{system.title}, seed {seed}: red amplifies under β = +1, blue suppresses, blank is exactly 0."
    return _head_map(name, caption, "α", scalars.location.layers, values, file)


def position_maps(lab: Laboratory, task: Task) -> list[HeadMap]:
    """The scalars per site and position of the first seed, with the tokens that all prompts share."""
    seed, system = lab.size.seeds[0], system_named("scalars-by-position")
    learned = lab.learned(task, system, seed)
    name = f"{task.name}-positions"
    file = _file(lab, name)
    train = task.examples(lab.tokenizer, lab.size, seed, aligned=True).train
    tokens = [slots(lab.tokenizer, example) for example in train]
    plots.heatmap(learned, file, tokens=tokens, title=f"{task.title}: per site and position")
    shared = [found.pop() if len(found := set(slot)) == 1 else "(varies)" for slot in zip(*tokens, strict=True)]
    rows = [f"{number} {token.replace('Ġ', ' ').replace('▁', ' ').strip()}" for number, token in enumerate(shared)]
    maps = []
    for site, single in zip(system.sites, learned.singles, strict=True):
        assert isinstance(single, ActivScalar)
        where = {"attn_out": "attention outputs", "mlp_out": "MLP outputs"}[site]
        if single.location.paths:
            where += f" as returned by {single.location.paths['mlp']}"
        values = single.alpha.detach()[:, :, 0].float().cpu()
        caption = f"{system.title}, {where}, seed {seed}."
        maps.append(HeadMap(f"{name}-{site}", caption, "α", single.location.layers, rows, values.tolist(), file))
    return maps


def knock_out_map(lab: Laboratory, task: Task) -> HeadMap:
    """The measured change when one head is removed."""
    found = lab.results["knock-out"][task.name]
    values = torch.tensor(found["measured"])
    name = f"{task.name}-knock-out"
    file = _file(lab, name)
    n_top = min(found["n_top"], values.numel())
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[values.flatten().abs().topk(n_top).indices] = True
    plots.head_scores(
        values, file, chosen=chosen.view(values.shape), title=f"{task.title}: removing one head at a time"
    )
    caption = "Change of z[c] − z[w] when one head is removed: below 0 (blue) the head speaks for the correct answer."
    return _head_map(name, caption, "Δ logits", range(len(values)), values, file)


def how_often(lab: Laboratory, task: Task, system: System) -> HeadMap:
    """In how many seeds each head is scaled."""
    learned = [lab.learned(task, system, seed) for seed in lab.size.seeds]
    total = sum((one.alpha.detach()[:, 0].cpu() != 0).float() for one in learned if isinstance(one, ActivScalar))
    assert isinstance(total, torch.Tensor)
    name = f"{task.name}-{system.name}-stability"
    file = _file(lab, name)
    every = total == len(learned)
    title = f"{task.title}: number of seeds that scale a head"
    plots.head_scores(total, file, layers=learned[0].location.layers, chosen=every, title=title)
    caption = f"{system.title}: in how many of {len(learned)} seeds a head is scaled."
    return _head_map(name, caption, "seeds", learned[0].location.layers, total, file, "{:.0f}")


def _head_map(
    name: str, caption: str, quantity: str, layers: Sequence[int], values: torch.Tensor, file: Path,
    form: str = "{:+.3f}",
) -> HeadMap:  # fmt: skip
    rows = [f"head {head}" for head in range(values.shape[1])]
    rounded = [[round(value, 5) for value in row] for row in values.tolist()]
    return HeadMap(name, caption, quantity, list(layers), rows, rounded, file, form)


def _file(lab: Laboratory, name: str) -> Path:
    file = lab.folder / "pictures" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def slots(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The tokens of a prompt, with the names of the answers in their places."""
    answers = {
        tuple(tokenizer.encode(answer, add_special_tokens=False)): name
        for answer, name in ((example.correct, "(correct answer)"), (example.wrong, "(wrong answer)"))
    }
    ids = tokenizer(example.prompt)["input_ids"]
    return [answers.get((i,)) or token for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def overlap(lab: Laboratory, system: System) -> Picture:
    """How many heads the seeds and the tasks have in common."""
    names, sets = [], []
    for task in TASKS:
        for seed in lab.size.seeds:
            names.append(f"{task.short}, seed {seed}")
            sets.append(set(places(lab.learned(task, system, seed))))
    matrix = jaccard(sets)
    rows: list[list[Cell]] = [[name, *row] for name, row in zip(names, matrix, strict=True)]
    data = Table(f"overlap-{system.name}", [Column("set", "{}"), *(Column(name) for name in names)], rows)
    figure = plots.overlap(matrix, names, title="Heads that are scaled: seeds and tasks")
    caption = f"{system.title}: Jaccard index of the sets of scaled heads. The seed also chooses what is held out."
    return _kept(lab, figure, f"overlap-{system.name}", caption, data)


def path(lab: Laboratory) -> Picture:
    """Flips against the number of active scalars: along the ℓ1 path, and after the refit without the ℓ1 term."""
    curves: dict[str, list[PathPoint]] = {}
    frozen: dict[str, PathPoint] = {}
    data: list[list[Cell]] = []
    for task in TASKS:
        rows = lab.results["path"][task.name]
        points = [PathPoint(row["n_active"], *(fmean(row[key]) for key in ("correct", "wrong", "kl"))) for row in rows]
        curves[f"{task.short}, ℓ1 path"] = points
        refit = refit_rows(lab, task)
        if refit:
            curves[f"{task.short}, refit"] = [
                PathPoint(row["n_heads"], *(row[key][0] for key in ("flip_to_correct", "flip_to_wrong", "kl")))
                for row in refit
            ]
        still = rows[0]["frozen"]
        frozen[f"{task.short}, ℓ1 path"] = PathPoint(0, fmean(still["correct"]), fmean(still["wrong"]), 0.0)
    for name, run in {**curves, **{f"frozen model, {name}": [point] for name, point in frozen.items()}}.items():
        data += [[name, point.n_active, point.to_correct, point.to_wrong, point.kl] for point in run]
    columns = [
        Column(label, "{}") for label in ("curve", "active scalars", _METRICS["correct"], _METRICS["wrong"], "KL")
    ]
    figure = plots.path(curves, kl=True, baseline=frozen)
    caption = "Test prompts of the first seed. Dashed: the frozen model."
    return _kept(lab, figure, "path", caption, Table("path-picture", columns, data))


def refit_rows(lab: Laboratory, task: Task) -> list[dict[str, Any]]:
    """The rows of the method that chooses heads by the ℓ1 path and fits them without the ℓ1 term."""
    return list(lab.results["heads"][task.name].get("activ-scalar", {}).get("rows", ()))


def head_methods(lab: Laboratory, task: Task) -> Picture | None:
    """The mean flip rate of each method against the number of heads."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    data: list[list[Cell]] = []
    for group in lab.results["heads"][task.name].values():
        for row in group["rows"]:
            both = (row["flip_to_correct"][0] + row["flip_to_wrong"][0]) / 2
            x, y = curves.setdefault(row["method"], ([], []))
            x.append(row["k"])
            y.append(both)
            data.append([row["method"], row["k"], both])
    if not curves:
        return None
    record = lab.results["comparison"][task.name]["scalars"][0]["test"]["frozen"]
    still = (fmean(record["correct"]) + fmean(record["wrong"])) / 2
    data.append(["frozen model", 0, still])
    name = f"{task.name}-methods"
    figure = plots.strengths(
        curves, xlabel="number of heads", ylabel=_FLIPS, ylim=(0, 1), baseline=still,
        title=f"{task.title}: methods that choose heads",
    )  # fmt: skip
    columns = [Column(label, "{}") for label in ("method", "heads", "flips")]
    return _kept(lab, figure, name, "Test prompts of the first seed.", Table(f"{name}-picture", columns, data))


def transfer(lab: Laboratory, task: Task) -> Picture | None:
    """Flips against the length of the prompts."""
    rows = lab.results["transfer"][task.name]["lengths"]
    curves, data, frozen = {}, [], ([], [])  # type: ignore[var-annotated]
    for system in transferred():
        found = [rows[number][system.name] for number in sorted(rows, key=int)]
        found = [row for row in found if row["runs"]]
        if not found:
            return None
        places_of = [row["lengths"][1] for row in found]
        n_runs = len(found[0]["runs"])
        values = [[_flip(row["runs"][run]) for row in found] for run in range(n_runs)]
        title = system.title + " *" * system.aligned
        curves[title] = (places_of, values)
        data += [
            [title, row["lengths"][1], lab.size.seeds[run], _flip(row["runs"][run]), _flip(row["runs"][run]["frozen"])]
            for row in found for run in range(n_runs)
        ]  # fmt: skip
        if system.aligned:
            frozen = (places_of, [fmean(_flip(one["frozen"]) for one in row["runs"]) for row in found])
    name = f"{task.name}-transfer"
    figure = plots.strengths(
        curves, xlabel="tokens of the longest prompt", ylim=(0, 1), baseline=frozen,
        ylabel=_FLIPS, title=f"{task.title}: longer prompts",
    )  # fmt: skip
    columns = [Column(label, "{}") for label in ("system", "tokens", "seed", "flips", "frozen model")]
    caption = "Prompts after unrelated sentences (* aligned prompts, which the dashed line of the frozen model is for)."
    return _kept(lab, figure, name, caption, Table(f"{name}-picture", columns, data))


def _flip(record: dict[str, Any]) -> float:
    return (fmean(record["correct"]) + fmean(record["wrong"])) / 2


def recipe(lab: Laboratory, name: str) -> Picture | None:
    """Perplexity against strength; strength 0 is the frozen model."""
    titles = {
        "act-add": f"ActAdd, “{recipes.ADDED}” − “{recipes.SUBTRACTED}”",
        "mean-centring": f"Mean-centring, texts {recipes.TOPIC}",
        "instruction": f"Instruction vector, “{recipes.INSTRUCTION}”",
    }
    found = lab.results["recipes"][name]
    rows = [row for row in found.get("rows", ()) if row.get("perplexity") is not None]
    if not rows:
        return None
    points = ([row["strength"] for row in rows], [row["perplexity"] for row in rows])
    figure = plots.strengths(
        {titles[name]: points}, ylabel="median perplexity of the continuations", log=True,
        baseline=next((row["perplexity"] for row in rows if row["strength"] == 0), None),
        title=f"{titles[name]}, layer {found['layer']}",
    )  # fmt: skip
    data = Table(
        f"{name}-picture", [Column("strength", "{}"), Column("perplexity", "{}")], list(zip(*points, strict=True))
    )
    return _kept(lab, figure, name, "Median perplexity of the continuations under the frozen model.", data)
