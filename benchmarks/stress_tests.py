"""Stress tests of three interventions on country-capital conflicts: the tables of docs/stress.md.

    python -m benchmarks.stress_tests --out benchmarks/results/stress                   # the three, on the demo's model
    python -m benchmarks.stress_tests --only scalars --scalars FOLDER --model NAME --name NAME
    python -m benchmarks.stress_tests --table

All are of conflicts in one wording and are tested on held-out ones: `ActivScalar` by the defaults and a `SteerVec` at
one layer, both learned from 192, and 20 heads by attribution with a shared strength, chosen on the first 96 of these.
Each has a file of its own; those that are there are not made again. --scalars takes the scalars that an earlier fit by
the defaults has saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import actscale_fast as af

from .by_the_defaults import examples
from .models import named_model
from .results import FOLDER

N_TESTED, SEED = 24, 0
#: Where the vector is added: two thirds of the way up.
VECTOR_DEPTH = 2 / 3
VECTOR_STEPS, N_HEADS, MAX_KL = 40, 20, 1.0


def scalars(model: Any, tokenizer: Any, train: list[af.Example]) -> af.Intervention:
    """One scalar per head, fitted by the defaults."""
    made = af.ActivScalar.for_model(model)
    af.fit(model, tokenizer, train, made, seed=SEED, progress=False)
    return made


def vector(model: Any, tokenizer: Any, train: list[af.Example]) -> af.Intervention:
    """One vector on the residual stream, fitted."""
    layer = int(VECTOR_DEPTH * model.config.num_hidden_layers)
    made = af.SteerVec.for_model(model, site="residual", layers=[layer])
    af.fit(model, tokenizer, train, made, steps=VECTOR_STEPS, seed=SEED, progress=False)
    return made


def heads(model: Any, tokenizer: Any, train: list[af.Example]) -> af.Intervention:
    """The heads with the largest attribution, and one strength for all."""
    found = af.select_heads(
        model, tokenizer, train[:96], "attribution", N_HEADS, max_kl=MAX_KL, seed=SEED, progress=False
    )
    return found.intervention()


MAKERS: dict[str, Callable[..., af.Intervention]] = {"scalars": scalars, "vector": vector, "heads": heads}
CALLED = {
    "scalars": "`ActivScalar`, the defaults",
    "vector": "`SteerVec`, one layer",
    "heads": f"{N_HEADS} heads by attribution, one strength",
}


def rounded(value: Any) -> Any:
    """The same with four digits after the point in all numbers."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def table(folder: Path) -> str:
    """The files of a folder as two tables in Markdown: what was measured, and each gate's figures (bold: it failed)."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    records.sort(key=lambda one: (-len(one["result"]["rows"]), one["model"], list(CALLED).index(one["intervention"])))
    results = [af.StressResult.from_dict(one["result"]) for one in records]
    named = ["", *(f"{CALLED[one['intervention']]}, {one['model']}" for one in records)]
    lines = [named]
    for label in dict.fromkeys(row.label for one in results for row in one.rows):
        found = [next((row for row in one.rows if row.label == label), None) for one in results]
        lines.append([label, *("" if row is None else _cell(row) for row in found)])
    verdicts = [named]
    for index, title in enumerate(("control", "utility", "robustness")):
        gates = [one.gates[index] for one in results]
        marks = [("passed" if one.passed else "**failed**") + ("" if one.decided else ", not decided") for one in gates]
        verdicts.append([f"**{title}**", *marks])
        for checks in zip(*(gate.checks for gate in gates), strict=True):
            sign = "≥" if checks[0].at_least else "≤"
            title = f"{checks[0].what.split(',')[0]} ({sign} {checks[0].threshold:g})"
            verdicts.append([title, *map(_verdict, checks)])
    return "\n".join(_markdown(some) for some in (lines, verdicts))


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _verdict(check: Any) -> str:
    """A figure with its interval, and the row that it is from."""
    figure = f"{check.value:.2f}" if check.passed else f"**{check.value:.2f}**"
    _, _, row = check.what.partition(", ")
    return f"{figure} [{check.interval[0]:.2f}, {check.interval[1]:.2f}]" + (f" {row}" if row else "")


def _cell(row: af.StressRow) -> str:
    figures = row.figures
    if row.gate == "control":
        return (
            f"{figures['frozen_correct']:.2f} → {figures['correct']:.2f}, {figures['frozen_wrong']:.2f} → "
            f"{figures['wrong']:.2f}"
        )
    if row.kind == "KL":
        return f"{figures['plus']:.2f}, {figures['minus']:.2f}"
    return f"{figures['frozen']:.2f} → {figures['plus']:.2f}, {figures['minus']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make and test what has no file yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress_tests")
    parser.add_argument("--model", help="a folder or a name on the hub (default: the demo's model)")
    parser.add_argument("--name", help="the model's name in the files (default: the folder's)")
    parser.add_argument("--only", choices=tuple(MAKERS), help="one of the interventions")
    parser.add_argument("--scalars", type=Path, help="folder of scalars that were fitted by the defaults before")
    parser.add_argument("--out", type=Path, default=FOLDER / "stress", help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="print the table of the files in --out instead")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.out), end="")
        return 0
    model, tokenizer, name = named_model(options.model, options.name)
    train, test = examples(tokenizer, "capitals")
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in [options.only] if options.only else list(MAKERS):
        path = options.out / f"{name}-{kind}.json"
        if path.exists():
            continue
        if kind == "scalars" and options.scalars is not None:
            made = af.load_intervention(options.scalars)
        else:
            made = MAKERS[kind](model, tokenizer, train)
        result = af.stress(model, tokenizer, made, test[:N_TESTED], seed=SEED)
        record = {
            "model": name,
            "intervention": kind,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
            "n_active": made.n_active,
            "result": rounded(result.to_dict()),
        }
        text = json.dumps(record, ensure_ascii=False).replace('{"gate"', '\n{"gate"')
        path.write_text(text + "\n", encoding="utf-8")
        result.plot(path.with_suffix(".png"), dpi=110, title=f"{CALLED[kind].replace('`', '')}, {name}")
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
