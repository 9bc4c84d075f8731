"""What a command prints, and where: --quiet, --json, and progress bars on a terminal alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from .._log import StderrHandler, logger

_quiet: list[bool] = [False]


def is_quiet() -> bool:
    """Whether only results, warnings and errors are printed."""
    return _quiet[-1]


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether progress bars are shown: on a terminal, unless --quiet was given."""
    return not getattr(options, "quiet", False) and sys.stderr.isatty()


@contextlib.contextmanager
def printing(options: argparse.Namespace) -> Iterator[None]:
    """Print as the options say while the block runs; with --json, `options.result` is printed when it ends well.

    Everything else that the command prints goes to stderr then, so that stdout holds one JSON document. Each warning is
    one line on stderr.
    """
    quiet, as_json = getattr(options, "quiet", False), getattr(options, "json", False)
    handler, level = StderrHandler(), logger.level
    logger.addHandler(handler)
    handler.speaker = getattr(options, "speaker", "")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    _quiet.append(quiet)
    options.result = None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = _as_one_line
            if as_json:
                elsewhere = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr  # noqa: PTH123
                stack.enter_context(contextlib.redirect_stdout(elsewhere))
            yield
        if as_json:
            print(json.dumps(_finite(options.result), indent=2, ensure_ascii=False), flush=True)
    finally:
        _quiet.pop()
        logger.removeHandler(handler)
        logger.setLevel(level)


def _as_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show a warning without the line of code that it comes from."""
    logger.warning(" ".join(str(message).split()))


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
