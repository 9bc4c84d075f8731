"""The entry point: runs one command and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from .config_file import WRITERS, given_options, with_config, write_config
from .parser import build_parser
from .processes import place, together
from .suggesting_parser import SuggestingParser
from .values import joined_signed_lists
from .verbosity import printing

Command = Callable[..., int]
#: The modules of commands that are not defined in a module of the same name.
_HOMES = dict.fromkeys(("fit", "evaluate", "generate", "plot", "merge"), "commands") | {"combine": "extract"}
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; by default those of the process.

    Returns:
        0 on success, 1 after an error (with one line on stderr), 130 after an interrupt. Wrong usage exits with 2.
    """
    words = joined_signed_lists(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    command, depth = parser.subparser(words)
    try:
        words = with_config(words, parser)
    except (ValueError, OSError) as error:
        command.error(_one_line(error))
    options, rest = parser.parse_known_args(words)
    options.given = given_options(words, parser)
    if rest and options.command != "bench":
        (command if depth else parser).refuse(rest)
    try:
        with together(options) as leads:
            if options.command == "bench":
                return _command("bench")(rest)
            run = _command(options.command)
            return _printed(run, options, words, parser, leads)
    except KeyboardInterrupt:
        print("\nactscale-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe is gone; keep Python from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"actscale-fast: error{place()}: {_one_line(error)}", file=sys.stderr)
        return 1


def _printed(
    run: Command, options: argparse.Namespace, words: Sequence[str], parser: SuggestingParser, leads: bool
) -> int:
    """Run a command and print its results; the first of several processes writes the file that repeats the run."""
    with printing(options):
        status = run(options)
        if leads and status == 0 and options.command in WRITERS and not getattr(options, "gather", False):
            write_config(Path(options.out), words, parser)
    return status


def _command(name: str) -> Command:
    """The function of a command, imported only when it runs because it imports torch."""
    home = _HOMES.get(name, name)
    return getattr(importlib.import_module(f".{home}", __package__), name)  # type: ignore[no-any-return]


def _one_line(error: Exception) -> str:
    text = " ".join(_without_number(error).split())
    if not isinstance(error, _EXPECTED):
        return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
    return text or f"{type(error).__name__} (--debug shows where)"


def _without_number(error: Exception) -> str:
    """The error's message; that of the system without its number: "data.jsonl: no such file or directory"."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = error.strerror[:1].lower() + error.strerror[1:]
        return ": ".join([" -> ".join(names), reason]) if names else reason
    return str(error)
