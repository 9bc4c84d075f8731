"""The entry point: runs one command and turns errors into one line and an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from .parser import build_parser
from .values import joined_signed_lists

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
    options, rest = parser.parse_known_args(words)
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "bench":
            return _command("bench")(rest)
        return _command(options.command)(options)
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
            print(f"actscale-fast: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _command(name: str) -> Command:
    """The function of a command, imported only when it runs because it imports torch."""
    home = _HOMES.get(name, name)
    return getattr(importlib.import_module(f".{home}", __package__), name)  # type: ignore[no-any-return]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, _EXPECTED):
        return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
    return text or f"{type(error).__name__} (--debug shows where)"
