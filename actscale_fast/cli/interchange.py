"""`actscale-fast interchange`: where a variable of a task is kept (Boundless DAS)."""

from __future__ import annotations

import argparse

from .. import learning
from .._files import write_json
from ..interventions import BoundlessDAS
from .loading import check_file, load_files, load_model, load_task, output_folder
from .output import print_evaluation, say
from .record import save_record


def interchange(options: argparse.Namespace) -> int:
    """Learn a rotation and a boundary from pairs, save them, and measure them on held-out pairs."""
    train, test = load_files(options)
    check_file(options.checkpoint, "checkpoint")
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    if options.task is not None:
        train, test = load_task(options, tokenizer, options.seed)
    das = BoundlessDAS.for_model(model, site=options.site, layers=options.layers, positions=options.positions)
    result = learning.fit_interchange(
        model, tokenizer, train, das, epochs=options.epochs, batch_size=options.batch_size,
        rotation_lr=options.rotation_lr, boundary_lr=options.boundary_lr, boundary_weight=options.boundary_weight,
        seed=options.seed, checkpoint=options.checkpoint,
    )  # fmt: skip
    (out / "evaluation.json").unlink(missing_ok=True)  # of a former intervention in this folder
    das.save_pretrained(out)
    write_json(out / "history.json", result.history)
    save_record(out, options)
    if test:
        evaluation = learning.evaluate(model, tokenizer, test, das)
        print_evaluation("Held-out pairs: correct is the counterfactual answer", evaluation)
        write_json(out / "evaluation.json", evaluation.to_dict())
    say(f"saved in {out}")
    return 0
