"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .blocks import Cell, Column, Table
from .claims import EFFECTIVE, Claim, fewer_of_both, tests
from .comparing import steps_in_equal_time
from .heads import FIGURES
from .intervals import Interval, mean
from .laboratory import Laboratory
from .remedies import MORE
from .systems import SYSTEMS, System, system_named
from .task_forms import FORMS, Task

#: The columns of a comparison: (figure, heading, form).
_COLUMNS = (
    ("correct", "correct above wrong, β = +1", "{:.2f}"),
    ("wrong", "wrong above correct, β = −1", "{:.2f}"),
    ("top_correct", "correct is the top token", "{:.2f}"),
    ("top_wrong", "wrong is the top token", "{:.2f}"),
    ("said_correct", "generates the correct answer", "{:.2f}"),
    ("said_wrong", "generates the wrong answer", "{:.2f}"),
    ("kl", "KL, nats", "{:.3f}"),
    ("kept", "top other token kept", "{:.2f}"),
)
#: What the baselines are called.
BASELINES = {"random": "the same scalars at random places", "gradient": "scalars from the gradient at 0"}
_VERDICTS = {"held": "**held**", "not held": "**not held**"}
#: The same for a figure that decides no claim.
_REACHED = {"held": "reached", "not held": "missed", "not decided": "not decided"}


def claims_table(claims: Sequence[Claim]) -> Table:
    """The claims with their intervals and verdicts."""
    columns = [Column(label) for label in ("claim", "task", "form", "criterion", "measured [95 % interval]", "verdict")]
    rows = [
        [one.claim, one.task, one.form, one.criterion, one.found, _VERDICTS.get(one.verdict, one.verdict)]
        for one in claims
    ]
    return Table("claims", columns, rows)


def remedies_table(lab: Laboratory) -> Table | None:
    """What was tried for the claims that are not held or not decided."""
    rows: list[list[Cell]] = []
    for task, kinds in lab.results.get("remedies", {}).items():
        for kind, attempts in kinds.items():
            for one in attempts.values():
                runs = one["runs"]
                figures = [mean([run[name] for run in runs]) for name in ("correct", "wrong", "kl")]
                smaller = fewer_of_both(runs)
                n_active = fmean(run["n_active"] for run in runs)
                share = n_active / runs[0]["n_parameters"]
                rows.append(
                    [task, kind, one["what"], one["steps"], *figures, smaller, n_active, share,
                     _REACHED[smaller.at_least(EFFECTIVE)]]
                )  # fmt: skip
    if not rows:
        return None
    columns = [
        Column("task"), Column("claim about scalars"), Column("tried"), Column("steps", "{:d}"),
        Column("correct above wrong"), Column("wrong above correct"), Column("KL, nats", "{:.3f}"),
        Column("the smaller flip rate"), Column("not 0", "{:.0f}"), Column("share", "{:.0%}"),
        Column(f"at least {EFFECTIVE:.0%} in each direction"),
    ]  # fmt: skip
    return Table("remedies", columns, rows)


def comparison_table(lab: Laboratory, task: Task, *, aligned: bool, equal_time: bool = False) -> Table:
    """All systems of one form, with the frozen model and the baselines, on the test prompts."""
    systems = [system for system in SYSTEMS if system.aligned is aligned]
    found = lab.results["equal-time" if equal_time else "comparison"][task.name]
    form = FORMS[aligned]
    still = [
        record["frozen"] | said | {"n_active": 0, "n_places": 0, "l1": 0.0, "n_parameters": record["n_parameters"]}
        for record, said in zip(tests(found[systems[0].name]), lab.results["frozen"][task.name][form], strict=False)
    ]
    rows = [_row("frozen model", still, None, None)]
    for system in systems:
        runs = found[system.name]
        steps, seconds = (fmean(run[name] for run in runs) for name in ("steps", "seconds"))
        rows.append(_row(system.title, tests(runs), steps, seconds))
    baselines = lab.results["baselines"][task.name][form][: len(still)]
    for name, title in BASELINES.items():
        rows.append(_row(title, tests([run[name] for run in baselines]), None, None))
    columns = [Column("system"), *(Column(label, style) for _, label, style in _COLUMNS)]
    columns += [Column("not 0", "{:.0f}"), Column("of", "{:.0f}"), Column("vectors changed", "{:.0f}")]
    columns += [Column("ℓ1", "{:.1f}"), Column("steps", "{:.0f}"), Column("s per fit", "{:.0f}")]
    return Table(f"{task.name}-{form}{'-equal-time' if equal_time else ''}", columns, rows)


def more_steps_words(lab: Laboratory, task: Task, *, aligned: bool, equal_time: bool = False) -> list[str]:
    """A sentence for each system of a comparison that took more steps than it was given."""
    found = lab.results["equal-time" if equal_time else "comparison"][task.name]
    words = []
    for system in SYSTEMS:
        if system.aligned is aligned:
            given = steps_in_equal_time(lab, task, system) if equal_time else lab.size.steps
            taken = [run["steps"] for run in found[system.name]]
            more = [steps for steps in taken if steps > given]
            if more:
                words.append(
                    f"{system.title}, took up to {max(more)} steps instead of {given} with {len(more)} of {len(taken)} "
                    f"seed{'s' * (len(taken) > 1)}: shorter fits left too many scalars."
                )
    return words


def _row(title: str, records: Sequence[Any], steps: float | None, seconds: float | None) -> list[Cell]:
    cells: list[Cell] = [title]
    for name, _, _ in _COLUMNS:
        cells.append(mean([record[name] for record in records]))
    cells += [mean([[record["n_active"]] for record in records]), records[0]["n_parameters"]]
    cells += [mean([[record[name]] for record in records]) for name in ("n_places", "l1")]
    return [*cells, steps, seconds]


def transfer_table(lab: Laboratory, task: Task, axis: str, systems: Sequence[System]) -> Table:
    """Systems on longer prompts ("lengths") or in other wordings ("wordings"), beside the frozen model."""
    rows: list[list[Cell]] = []
    found = lab.results["transfer"][task.name][axis]
    for name in sorted(found, key=int) if axis == "lengths" else found:
        for system in systems:
            row = found[name][system.name]
            if not row["runs"]:
                continue
            low, high = row["lengths"]
            both = [mean([run[key] for run in row["runs"]]) for key in ("correct", "wrong")]
            still = [mean([run["frozen"][key] for run in row["runs"]]) for key in ("correct", "wrong")]
            kl = mean([run["kl"] for run in row["runs"]])
            length = f"{low}" if low == high else f"{low}–{high}"
            rows.append([name, length, system.title, still[0], both[0], still[1], both[1], kl])
    columns = [
        Column("sentences before" if axis == "lengths" else "wording"), Column("tokens"), Column("system"),
        Column("correct above wrong: frozen"), Column("β = +1"), Column("wrong above correct: frozen"),
        Column("β = −1"), Column("KL, nats", "{:.3f}"),
    ]  # fmt: skip
    return Table(f"{task.name}-{axis}", columns, rows)


def methods_table(lab: Laboratory, task: Task) -> Table:
    """All methods that choose heads at equal numbers of heads, the frozen model first."""
    record = lab.results["comparison"][task.name]["scalars"][0]["test"]["frozen"]
    still = [mean([record[name]]) for name in ("correct", "wrong", "top_correct", "top_wrong")]
    rows: list[list[Cell]] = [["frozen model", 0, None, *still, 0.0, None]]
    for group in lab.results["heads"][task.name].values():
        for row in group["rows"]:
            figures = [Interval(*row[name]) for name in FIGURES]
            rows.append([row["method"], row["n_heads"], row["strength"], *figures, row["seconds"]])
    columns = [
        Column("method"), Column("heads", "{:d}"), Column("strength", "{:g}"), Column("correct above wrong, β = +1"),
        Column("wrong above correct, β = −1"), Column("correct is the top token"), Column("wrong is the top token"),
        Column("KL, nats", "{:.3f}"), Column("s", "{:.0f}"),
    ]  # fmt: skip
    return Table(f"{task.name}-methods", columns, rows)


def path_table(lab: Laboratory, task: Task) -> Table:
    """The path of the ℓ1 weight, and the refits without it."""
    still = lab.results["path"][task.name][0]["frozen"]
    rows: list[list[Cell]] = [["frozen model", 0, 0.0, *(mean([still[name]]) for name in ("correct", "wrong", "kl"))]]
    for row in lab.results["path"][task.name]:
        figures = [mean([row[name]]) for name in ("correct", "wrong", "kl")]
        rows.append([f"λ_M {row['minimality']:.3g}", row["n_active"], row["n_active"] / row["n_parameters"], *figures])
    n_heads = lab.results["path"][task.name][0]["n_parameters"]
    for row in lab.results["heads"][task.name].get("activ-scalar", {}).get("rows", ()):
        figures = [Interval(*row[name]) for name in ("flip_to_correct", "flip_to_wrong", "kl")]
        rows.append([f"refit, at most {row['k']}", row["n_heads"], row["n_heads"] / n_heads, *figures])
    columns = [
        Column("fit"), Column("not 0", "{:d}"), Column("of the heads", "{:.0%}"),
        Column("correct above wrong, β = +1"), Column("wrong above correct, β = −1"), Column("KL, nats", "{:.3f}"),
    ]  # fmt: skip
    return Table(f"{task.name}-path", columns, rows)


def tuning_table(lab: Laboratory) -> Table:
    """Every point of the grid of settings, and the chosen one."""
    rows: list[list[Cell]] = []
    for task, systems in lab.results["tuning"].items():
        for name, found in systems.items():
            for point in found["points"]:
                own = point["settings"]
                mark = "✓" if own == found["chosen"] else ""
                weights = [own["faithfulness"], own["minimality"], own["lr"]]
                rows.append([task, system_named(name).title, *weights, point["flips"], point["kl"], mark])
    columns = [
        Column("task"), Column("system"), Column("λ_F", "{:.3g}"), Column("λ_M", "{:.3g}"),
        Column("learning rate", "{}"), Column("flips, validation"), Column("KL, validation", "{:.3f}"),
        Column("chosen"),
    ]  # fmt: skip
    return Table("tuning", columns, rows)


def tried_words(lab: Laboratory) -> str:
    """What was tried, and what it does not show."""
    return (
        f"What was tried for the claims that are not held or not decided: {MORE} times as many steps "
        f"({lab.size.steps * MORE}), a refit without the ℓ1 term, and scalars per site and position, on "
        f"{_counted(lab.size.remedy_seeds, 'seed')}. It was tried after the test prompts were measured and is "
        "measured on the same ones; the last column compares the smaller flip rate alone with its bound, whatever the "
        "criterion of the claim. This suggests where a claim fails; it changes no verdict above."
    )


def _counted(number: int, thing: str) -> str:
    return f"the first {thing}" if number == 1 else f"the first {number} {thing}s"


def time_words(lab: Laboratory) -> str:
    """One sentence before a table with equal time."""
    size = lab.size
    seeds = f" ({_counted(size.time_seeds, 'seed')})" if size.time_seeds < len(size.seeds) else ""
    return (
        f"Equal time: each system takes as many steps as the time of {SYSTEMS[0].title} allows, at least a quarter of "
        f"the steps above and at most four times as many{seeds}:"
    )
