"""`actscale-fast sweep`: many fits at once, their table, and their Pareto front."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import defaults, learning, plots
from ..interventions import ActivScalar
from ..learning.sweep.jobs import share_of
from .loading import check_file, examples_for, load_files, load_model, output_folder
from .options import RECOMPUTE, given_paths
from .output import print_table, say
from .sweep_jobs import keep_records, path_of_jobs
from .verbosity import shows_progress

#: The options that `--gather` takes.
_WITH_GATHER = ("--gather", "--out", "--plot", "--quiet", "--debug")


def sweep(options: argparse.Namespace) -> int:
    """Fit every combination of the lists, save and evaluate the fits, and draw their Pareto front."""
    if options.gather:
        return _gather(options)
    if options.task is None and options.data is None:
        raise ValueError("one of --data and --task is required (or --gather)")
    share_of(options.points)
    if options.path is not None and options.minimality is not None:
        raise ValueError("--path chooses the weights of the ℓ1 norm and cannot be used with --minimality")
    if options.task_seed is None:
        options.task_seed = options.seed
    if options.seeds is None:
        options.seeds = [options.seed]
    files = load_files(options)
    check_file(options.plot, "plot")
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    train, test = examples_for(options, tokenizer, options.task_seed, files)
    template = ActivScalar.for_model(model, site=options.site, positions=options.positions, **given_paths(options))
    grid: dict[str, list[Any]] = {}
    for name in ("minimality", "faithfulness", "margin", "lr", "layers"):
        if getattr(options, name) is not None:
            grid[name] = getattr(options, name)
    grid["seed"] = options.seeds
    if options.path is not None:

        def weights() -> list[float]:
            paths = [
                learning.minimality_path(
                    model,
                    tokenizer,
                    train,
                    options.path,
                    objective=learning.Objective(margin=max(options.margin or [defaults.MARGIN])),
                    intervention=template,
                    steps=options.steps,
                    batch_size=options.batch_size,
                    seed=seed,
                )
                for seed in options.seeds
            ]
            return max(paths, key=lambda weights: weights[0])  # the scalars of every seed stay at 0

        grid["minimality"] = path_of_jobs(out, options, model, train, template, weights)
    result = learning.sweep(
        model,
        tokenizer,
        train,
        grid,
        intervention=template,
        steps=options.steps,
        batch_size=options.batch_size,
        tolerance=options.tolerance,
        warm_start=options.path is not None or options.warm_start,
        progress=shows_progress(options),
        at_once=options.at_once,
        points=options.points,
        evaluate_on=test or None,
        folder=out,
        checkpoint_every=options.checkpoint_every,
        recompute=RECOMPUTE[options.recompute],
    )
    keep_records(out, options, result, model, train, test)
    if options.points is None:
        return _show(options, result, out)
    columns, rows = result.table()
    print_table(f"{len(rows)} fits of the share {options.points}", columns, rows)
    say(f"saved in {out}: one folder for each fit; when all jobs have finished: sweep --gather --out {out}")
    return 0


def _gather(options: argparse.Namespace) -> int:
    """Write the index of a sweep whose points several jobs have fitted, and draw its front."""
    others = [option for option in options.given if option not in _WITH_GATHER]
    if others:
        raise ValueError(f"--gather reads what is in --out; it cannot be used with {', '.join(others)}")
    check_file(options.plot, "plot")
    return _show(options, learning.gather_sweep(options.out), Path(options.out))


def _show(options: argparse.Namespace, result: learning.SweepResult, out: Path) -> int:
    columns, rows = result.table()
    print_table(f"{len(rows)} fits", columns, rows)
    picture = options.plot or out / "front.png"
    plots.pareto(result, picture)
    say(f"saved in {out}: one folder for each fit, and sweep.json; the Pareto front is drawn in {picture}")
    return 0
