"""Heads by attribution, judged in two ways: tables of docs/heads.md.

    python -m benchmarks.heads_judged --out benchmarks/results/heads

Necessity and sufficiency of 20 heads on indirect object identification (faithfulness.json), and 20 heads with one
strength on three kinds of knowledge conflict (conflicts.json). Without --model the demo's model is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import actscale_fast as af

from .results import FOLDER
from .stress_tests import rounded

N_HEADS, SEED, MAX_KL = 20, 0, 1.0
N_TRAIN, N_TEST = 48, 24


def faithfulness(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Necessity and sufficiency; a prompt's source is the one before it, with other names at the same tokens."""
    train, test = af.tasks.indirect_object_identification(
        tokenizer, n_train=N_TRAIN, n_test=N_TEST, seed=SEED, aligned=True
    )
    paired = [replace(one, source=test[row - 1].prompt) for row, one in enumerate(test)]
    selection = af.select_heads(
        model, tokenizer, train, "attribution", N_HEADS, strength=1.0, seed=SEED, progress=False
    )
    found = af.head_faithfulness(model, tokenizer, paired, selection, n_random=2, seed=SEED)
    columns, rows = found.table()
    return {"heads": [[head.layer, head.head] for head in selection.heads], "columns": columns, "table": rows} | (
        found.to_dict()
    )


def conflicts(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The figures of each kind of conflict."""
    train, test = af.tasks.knowledge_conflicts(tokenizer, n_train=N_TRAIN, n_test=2 * N_TEST, seed=SEED)
    selection = af.select_heads(
        model, tokenizer, train, "attribution", N_HEADS, max_kl=MAX_KL, seed=SEED, progress=False
    )
    found = af.evaluate_conflicts(model, tokenizer, test, selection.intervention())
    columns, rows = found.table()
    return {"strength": selection.strength, "columns": columns, "table": rows} | found.to_dict()


def table(path: Path) -> str:
    """The table of a file as Markdown."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    lines = [kept["columns"], ["---"] * len(kept["columns"]), *kept["table"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what has no file yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads_judged")
    parser.add_argument("--model", help="a folder or a name on the hub (default: the demo's model)")
    parser.add_argument("--out", type=Path, default=FOLDER / "heads", help="folder of the JSON files")
    options = parser.parse_args(arguments)
    model: Any
    tokenizer: Any
    if options.model is None:
        model, tokenizer = af.load_demo_model()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    for measure in (faithfulness, conflicts):
        path = options.out / f"{measure.__name__}.json"
        if not path.exists():
            text = json.dumps(rounded(measure(model, tokenizer)), ensure_ascii=False)
            path.write_text(text.replace('{"ablation"', '\n{"ablation"') + "\n", encoding="utf-8")
        print(table(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
