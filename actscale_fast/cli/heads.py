"""`actscale-fast heads`: which heads to scale, by one method, or by several that are compared."""

from __future__ import annotations

import argparse
from typing import Any

from .. import learning
from .loading import examples_for, load_files, load_model, output_folder
from .options import HEAD_METHODS
from .output import print_table, say, show
from .provenance import provenance
from .record import keep_selected, measure_learned
from .verbosity import shows_progress


def heads(options: argparse.Namespace) -> int:
    """Choose heads, save their intervention and evaluate it; or compare several methods and numbers of heads."""
    unknown = [name for name in options.method if name not in HEAD_METHODS]
    if unknown:
        raise ValueError(f"--method: got {unknown[0]!r}, expected some of {', '.join(HEAD_METHODS)}")
    several = len(options.method) > 1 or len(options.k) > 1
    files = load_files(options)
    if several and options.task is None and not files[1]:
        raise ValueError("--method, --k: several are compared on held-out examples; give --test-data")
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    train, test = examples_for(options, tokenizer, options.seed, files)
    common: dict[str, Any] = {
        "layers": options.layers,
        "strengths": options.strengths,
        "validation": options.validation,
        "max_kl": options.max_kl,
        "direction": options.direction,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "progress": shows_progress(options),
    }
    own = dict(options.option or [])
    source = provenance(model, train, test)
    if several:
        result = learning.compare_heads(
            model, tokenizer, train, test, options.method, options.k, **common,
            options=dict.fromkeys(options.method, own) if own else None,
        )  # fmt: skip
        columns, rows = result.table()
        print_table(f"Heads by several methods, on {len(test)} held-out prompts", columns, rows)
        for one in result.results:
            folder = out / f"{one.selection.method}-{one.selection.k}"
            folder.mkdir(exist_ok=True)
            _keep(folder, options, one.selection, source)
        options.result = result.to_dict()
        result.save(out / "comparison.json")
        say(f"saved in {out}: comparison.json, and one folder for each row")
        return 0
    selection = learning.select_heads(model, tokenizer, train, options.method[0], options.k[0], **common, **own)
    show(str(selection))
    _keep(out, options, selection, source)
    options.result = selection.to_dict()
    if test:
        evaluation = learning.evaluate(model, tokenizer, test, selection.intervention())
        measure_learned(out, evaluation, "Held-out examples")
        options.result |= {"evaluation": evaluation.to_dict()}
    say(f"saved in {out}: the intervention, heads.json and heads.png")
    return 0


def _keep(folder: Any, options: argparse.Namespace, selection: learning.HeadSelection, source: dict[str, Any]) -> None:
    """Write the intervention with its record, the selection and its picture."""
    keep_selected(folder, options, selection.intervention(), method=selection.method, k=selection.k, **source)
    selection.save(folder / "heads.json")
    selection.plot(folder / "heads.png")
