"""Methods that choose heads, side by side on country-capital conflicts: the figures of docs/heads.md.

    python -m benchmarks.head_methods --out benchmarks/results/heads           # all methods; hours on two cores
    python -m benchmarks.head_methods --quick --out benchmarks/results/heads   # minutes: fewer prompts and methods
    python -m benchmarks.head_methods --cost --out benchmarks/results/heads    # the time to score heads

    python -m benchmarks.head_methods --mib --out benchmarks/results/heads     # CPR and CMD of six scores on IOI

`--cost` takes the CPU time of each method's scores beside one forward pass per head on the same prompts.

Without --model the demo's model is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import actscale_fast as af
from actscale_fast.frozen.batching import forward_arguments
from actscale_fast.learning.head_selection.methods import METHODS
from actscale_fast.learning.head_selection.select_heads import score
from actscale_fast.learning.head_selection.subject import Subject

from .models import named_model
from .stress_tests import rounded

#: Updates of each fit of the gates, by default; six are timed.
GATE_STEPS = 60
#: Of the quick run: what each method costs most is made small.
QUICK = ("random", "attribution", "sami", "sadi", "head-pursuit", "attribution-refit")
QUICK_OPTIONS: dict[str, dict[str, Any]] = {"attribution-refit": {"steps": 12, "fit_batch_size": 6, "lr": 0.15}}


def compared(model: Any, tokenizer: Any, *, quick: bool, seed: int = 0) -> af.HeadComparison:
    """The comparison at 5, 10, 20 and 40 heads."""
    n_train, n_test = (16, 12) if quick else (96, 64)
    train, test = af.tasks.country_capital_conflicts(
        tokenizer, n_train=n_train, n_test=n_test, seed=seed, templates=af.tasks.CONFLICT_TEMPLATES[:1]
    )
    names = QUICK if quick else [name for name in METHODS if name != "interchange"]  # the task has no sources
    return af.compare_heads(
        model, tokenizer, train, test, names, seed=seed, strengths=(1.0, 3.0) if quick else None,
        options=QUICK_OPTIONS if quick else None, progress=False,
    )  # fmt: skip


#: The figures of an evaluation that are kept, and where they stand in the table.
FIGURES = ("flip_to_correct", "flip_to_wrong", "kl")


def slim(result: af.HeadComparison, *, quick: bool, seed: int) -> dict[str, Any]:
    """What is kept of a comparison: the figures with their intervals, the strength and the heads."""
    rows = []
    for one in result.results:
        found = one.evaluation
        figures: dict[str, Any] = {name: round(getattr(found, name), 4) for name in FIGURES}
        figures |= {f"{name}_interval": [round(end, 4) for end in found.intervals[name]] for name in FIGURES}
        heads = [[head.layer, head.head] for head in one.selection.heads]
        chosen = {"method": one.selection.method, "k": one.selection.k, "strength": one.selection.strength}
        rows.append(chosen | figures | {"seconds": one.seconds, "heads": heads})
    frozen = result.results[0].evaluation.baseline
    assert frozen is not None
    counts = {"quick": quick, "seed": seed, "n_test": result.results[0].evaluation.n_examples}
    return counts | {"frozen": {name: getattr(frozen, name) for name in FIGURES[:2]}, "rows": rows}


def table(folder: Path) -> str:
    """The table of docs/heads.md, from capitals.json."""
    kept = json.loads((folder / "capitals.json").read_text(encoding="utf-8"))
    lines = ["| method | heads | strength | correct above wrong, β = +1 | wrong above correct, β = −1 | KL |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    frozen = kept["frozen"]
    lines += [f"| frozen model | | | {frozen['flip_to_correct']:.2f} | {frozen['flip_to_wrong']:.2f} | |"]
    for row in kept["rows"]:
        cells = [row["method"], str(row["k"]), f"{row['strength']:g}"]
        for name in FIGURES[:2]:
            low, high = row[f"{name}_interval"]
            cells.append(f"{row[name]:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {' | '.join([*cells, format(row['kl'], '.2f')])} |")
    return "\n".join(lines)


def mib_table(folder: Path) -> str:
    """The table of MIB's metrics in docs/heads.md, from mib.json."""
    rows = json.loads((folder / "mib.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["method"], row["ablation"]): row for row in rows}
    ablations = list(dict.fromkeys(row["ablation"] for row in rows))
    heads = [f"{metric}, {ablation}" for ablation in ablations for metric in ("CPR", "CMD")]
    lines = [f"| scores | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"{found[method, one][metric]:.2f}" for one in ablations for metric in ("cpr", "cmd")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(model: Any, tokenizer: Any, *, n_prompts: int = 1) -> list[dict[str, Any]]:
    """CPU seconds to score all heads by each method, and those of one forward pass per head, on the same prompts.

    The processor's time of this process, on one thread, because other processes make the time on the clock uncertain.

    JuICE runs the passes of a knock-out once per scale, so that its ratio to one pass per head and scale is the same.
    """
    torch.set_num_threads(1)
    train, _ = af.tasks.country_capital_conflicts(tokenizer, n_train=n_prompts, n_test=2)
    subject = Subject(model, tokenizer, train)
    arguments = forward_arguments(model, subject.data.batch(range(n_prompts)))
    n_heads = int(subject.exists.sum())
    rows = []
    for name in ("sami", "sadi", "head-pursuit", "attribution", "gates", "knock-out"):
        options, parts = ({"steps": 6}, GATE_STEPS // 6) if name == "gates" else ({}, 1)
        with torch.no_grad():
            model(**arguments)
            begun = time.process_time()
            for _ in range(3):
                model(**arguments)
            one = (time.process_time() - begun) / 3
        begun = time.process_time()
        score(subject, METHODS[name], 10, options)
        seconds, by_hand = parts * (time.process_time() - begun), one * n_heads
        rows.append({"method": name, "seconds": seconds, "pass_per_head": by_hand, "ratio": seconds / by_hand})
        print(f"{name:13} {seconds:7.2f} s   one pass per head {by_hand:7.1f} s   ratio {seconds / by_hand:.3f}")
    return rows


def mib(model: Any, tokenizer: Any, *, quick: bool, seed: int = 0) -> list[dict[str, Any]]:
    """MIB's circuit metrics of several scores on indirect object identification, by both ablations.

    A prompt's source is the next one: other names, place and thing at the same tokens.
    """
    n_train, n_test = (8, 4) if quick else (64, 64)
    train, test = af.tasks.indirect_object_identification(
        tokenizer, n_train=n_train, n_test=n_test, seed=seed, aligned=True
    )
    judged = [replace(one, source=test[(row + 1) % len(test)].prompt) for row, one in enumerate(test)]
    names = ["random", "attribution", "sami", "sadi", "head-pursuit"] + ["knock-out"] * (not quick)
    rows = []
    for name in names:
        selection = af.select_heads(model, tokenizer, train, name, 1, strength=1.0, seed=seed, progress=False)
        for ablation in ("zero", "interchange"):
            found = af.circuit_metrics(model, tokenizer, judged, selection, ablation=ablation)  # type: ignore[arg-type]
            rows.append({"method": name} | rounded(found.to_dict()))
            print(f"{name:13} {ablation:12} CPR {found.cpr:6.3f}  CMD {found.cmd:6.3f}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: the demo's model)")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    parser.add_argument("--quick", action="store_true", help="few prompts, and only methods without a fit or a sweep")
    parser.add_argument("--mib", action="store_true", help="judge scores by CPR and CMD instead")
    parser.add_argument("--cost", action="store_true", help="time the scores instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = named_model(options.model, None)
    if options.cost:
        text = json.dumps({"threads": torch.get_num_threads(), "rows": costs(model, tokenizer)}, indent=1)
        (options.out / "cost.json").write_text(text + "\n", encoding="utf-8")
        return 0
    if options.mib:
        text = json.dumps({"rows": mib(model, tokenizer, quick=options.quick, seed=options.seed)})
        (options.out / "mib.json").write_text(text.replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")
        print(mib_table(options.out))
        return 0
    result = compared(model, tokenizer, quick=options.quick, seed=options.seed)
    text = json.dumps(slim(result, quick=options.quick, seed=options.seed))
    (options.out / "capitals.json").write_text(text.replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")
    print(result)
    print(table(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
