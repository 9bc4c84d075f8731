"""A fit with the package's defaults on any model and one task: the figures of docs/evidence.md.

    python -m benchmarks.by_the_defaults --model FOLDER_OR_NAME --task capitals --out benchmarks/results/defaults

Without --model the demo's model is used. A GGUF release is first saved as a folder by transformers
(`from_pretrained(folder, gguf_file=…, quantization_config=GgufConfig(dequantize=True))`, then `save_pretrained`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import actscale_fast as af

from .models import named_model
from .results import FOLDER

N_TRAIN, N_TEST, SEED = 192, 96, 0
FIGURES = ("flip_to_correct", "flip_to_wrong", "top_correct", "top_wrong", "kl", "n_active", "n_scalars", "l1")


def examples(tokenizer: Any, task: str) -> Any:
    """The training and held-out examples: country-capital conflicts in one wording, or names."""
    sizes: dict[str, Any] = {"seed": SEED, "n_train": N_TRAIN, "n_test": N_TEST}
    if task == "capitals":
        return af.tasks.country_capital_conflicts(tokenizer, templates=af.tasks.CONFLICT_TEMPLATES[:1], **sizes)
    return af.tasks.indirect_object_identification(tokenizer, **sizes)


def measured(model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
    """The figures of a fit with the defaults on held-out examples, beside the frozen model's."""
    train, test = examples(tokenizer, task)
    scalars = af.ActivScalar.for_model(model)
    result = af.fit(model, tokenizer, train, scalars, seed=SEED)
    found = af.evaluate(model, tokenizer, test, scalars).to_dict()
    frozen = found["baseline"]
    assert result.objective is not None
    return {
        "minimality": result.objective.minimality,
        "steered": {name: found[name] for name in FIGURES},
        "frozen": {name: frozen[name] for name in FIGURES if name in frozen},
    }


#: What the table calls a figure, and where it stands.
ROWS = {
    "correct above wrong, β = +1": "flip_to_correct",
    "wrong above correct, β = −1": "flip_to_wrong",
    "correct is the top token, β = +1": "top_correct",
    "wrong is the top token, β = −1": "top_wrong",
}


def table(folder: Path) -> str:
    """The figures of all files as Markdown, frozen → steered."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    lines = [["frozen → with the scalars", *(f"{one['model']}, {one['task']}" for one in records)]]
    for name, key in ROWS.items():
        lines.append([name, *(f"{one['frozen'][key]:.2f} → **{one['steered'][key]:.2f}**" for one in records)])
    lines.append(["KL of the other tokens, mean", *(f"{one['steered']['kl']:.3f}" for one in records)])
    counts = (f"{one['steered']['n_active']} of {one['steered']['n_scalars']}" for one in records)
    lines.append(["active scalars", *counts])
    lines.append(["λ_M, 5 % of λ_max", *(f"{one['minimality']:.3f}" for one in records)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, measure, and write one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.by_the_defaults")
    parser.add_argument("--model", help="a folder or a name on the hub (default: the demo's model)")
    parser.add_argument("--name", help="the model's name in the file (default: the folder's)")
    parser.add_argument("--task", choices=("capitals", "names"), default="capitals")
    parser.add_argument("--table", action="store_true", help="print the table of the files in --out instead")
    parser.add_argument("--out", type=Path, default=FOLDER / "defaults", help="folder of the JSON files")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.out), end="")
        return 0
    model, tokenizer, name = named_model(options.model, options.name)
    record = {
        "model": name,
        "task": options.task,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
        "n_train": N_TRAIN, "n_test": N_TEST, "seed": SEED,
        **measured(model, tokenizer, options.task),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}-{options.task}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
