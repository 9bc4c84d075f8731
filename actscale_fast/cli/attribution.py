"""`actscale-fast attribution`: what each head contributes to the answers, predicted and measured."""

from __future__ import annotations

import argparse

from .. import learning
from .._json import write_json
from ..interventions import ActivScalar
from .loading import examples_for, load_files, load_model, output_folder
from .options import given_paths
from .output import print_table, say, show
from .verbosity import shows_progress


def attribution(options: argparse.Namespace) -> int:
    """Print the heads that contribute most, and write all figures and the picture."""
    files = load_files(options)
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    examples, _ = examples_for(options, tokenizer, options.seed, files)
    scalars = ActivScalar.for_model(
        model, site=options.site, layers=options.layers, positions=options.positions, **given_paths(options)
    )
    result = learning.attribution(
        model,
        tokenizer,
        examples,
        intervention=scalars,
        knock_out=not options.no_knock_out,
        progress=shows_progress(options),
    )
    _print_top(result, options.top)
    options.result = result.to_dict()
    write_json(out / "attribution.json", options.result)
    result.heatmap(out / "attribution.png")
    say(f"wrote attribution.json and attribution.png in {out}")
    return 0


def _print_top(result: learning.Attribution, n: int) -> None:
    """The largest predictions beside the measurements, and how well all of them agree."""
    location = result.location
    shown = {"layer": True, "position": location.positions is not None, "head": location.site == "head"}
    columns = [name for name, is_shown in shown.items() if is_shown]
    measured = result.knock_out is not None
    rows = []
    for place in result.top(n):
        position = "" if location.positions is None else str(location.positions[place.slot])
        cells = {"layer": str(place.layer), "position": position, "head": str(place.head)}
        figures = [-place.score] + ([] if place.knock_out is None else [place.knock_out])
        rows.append([cells[name] for name in columns] + [f"{figure:+.3f}" for figure in figures])
    print_table(
        f"Removing one at a time ({result.n_examples} prompts)",
        [*columns, "predicted", *(["measured"] if measured else [])],
        rows,
    )
    show(f"change of the mean logit difference z[c] − z[w], which is {result.logit_difference:+.2f}")
    found = result.agreement
    if found is not None:
        show(
            f"agreement over {result.scores.numel()}: Pearson {found.pearson:.2f}, Spearman {found.spearman:.2f}, "
            f"{round(found.overlap * found.n_top)} of the {found.n_top} largest are the same"
        )
