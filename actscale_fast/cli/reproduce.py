"""`actscale-fast reproduce`: all systems on a model, in one report."""

from __future__ import annotations

import argparse

from ..reproduction import reproduce as run
from .loading import load_model, output_folder
from .output import say
from .verbosity import shows_progress


def reproduce(options: argparse.Namespace) -> int:
    """Run the stages that are missing and write the report."""
    out = output_folder(options.out)
    model, tokenizer = load_model(options)
    path = run(model, tokenizer, out, quick=options.quick, progress=shows_progress(options))
    say(f"wrote {path}")
    return 0
