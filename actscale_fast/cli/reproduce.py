"""`actscale-fast reproduce`: all systems on a model, or on several, in one report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..reproduction import FULL, PAPER_MODELS, QUICK, reproduce as run, reproduce_models as run_several
from .loading import load_model, output_folder
from .output import say
from .verbosity import shows_progress

#: The name of the demo's model in `--models`.
_DEMO = "demo"


def reproduce(options: argparse.Namespace) -> int:
    """Run the stages that are missing and write the report."""
    names = _names(options)
    out = output_folder(options.out)
    given: dict[str, Any] = {"quick": options.quick, "progress": shows_progress(options)}
    if options.seeds is not None:
        size = QUICK if options.quick else FULL
        given |= {"quick": False, "size": replace(size, seeds=tuple(range(options.seeds)))}
    if names:
        path = run_several([(_folder(name), partial(_loaded, options, name)) for name in names], out, **given)
    else:
        model, tokenizer = load_model(options)
        path = run(model, tokenizer, out, **given)
    say(f"wrote {path} and {path.with_suffix('.html').name}")
    return 0


def _names(options: argparse.Namespace) -> list[str]:
    """The models of `--models` and `--paper`; none: that of `--model`."""
    chosen = [f"--{name}" for name in ("model", "models", "paper") if getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[1]} cannot be used with {chosen[0]}, because both say which models to run")
    if options.paper:
        return list(PAPER_MODELS)
    names = [name.strip() for name in (options.models or "").split(",")]
    if options.models is not None and not all(names):
        raise ValueError(f"--models: got {options.models!r}, expected names or folders, separated by commas")
    return names if options.models else []


def _folder(name: str) -> str:
    """The last part of a model's name or path."""
    return Path(name).name or name


def _loaded(options: argparse.Namespace, name: str) -> Any:
    return load_model(argparse.Namespace(**vars(options) | {"model": None if name == _DEMO else name}))
