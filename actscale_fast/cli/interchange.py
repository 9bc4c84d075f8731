"""`actscale-fast interchange`: which directions hold a variable of a task (Boundless DAS)."""

from __future__ import annotations

import argparse

from .. import learning
from ..das.boundless_das import BoundlessDAS
from ..das.fit_interchange import fit_interchange
from .loading import check_file, examples_for, load_files, load_model, output_folder
from .options import given_paths
from .output import say
from .provenance import provenance
from .record import keep_learned, measure_learned
from .verbosity import shows_progress


def interchange(options: argparse.Namespace) -> int:
    """Learn a rotation and a boundary from pairs, save them, and evaluate them on held-out pairs."""
    files = load_files(options)
    check_file(options.checkpoint, "checkpoint")
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    train, test = examples_for(options, tokenizer, options.seed, files)
    das = BoundlessDAS.for_model(
        model, site=options.site, layers=options.layers, positions=options.positions, **given_paths(options)
    )
    result = fit_interchange(
        model, tokenizer, train, das, epochs=options.epochs, batch_size=options.batch_size,
        rotation_lr=options.rotation_lr, boundary_lr=options.boundary_lr, boundary_weight=options.boundary_weight,
        seed=options.seed, checkpoint=options.checkpoint, progress=shows_progress(options),
    )  # fmt: skip
    keep_learned(out, options, result, **provenance(model, train, test))
    if test:
        title = "Held-out pairs: correct is the counterfactual answer"
        measure_learned(out, learning.evaluate(model, tokenizer, test, das), title)
    say(f"saved in {out}")
    return 0
