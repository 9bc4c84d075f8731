"""`--config FILE`: options from a TOML or JSON file, which every run that learns writes into its folder.

The file holds the options as they would be typed, without the dashes: `steps = 40`, `task = "country-capital"`. An
option that is given on the command line replaces that of the file, and so does one that excludes it.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .._files import naming, write_bytes
from .._suggestions import did_you_mean
from .._version import __version__
from .suggesting_parser import SuggestingParser

FILE = "config.toml"
#: The commands whose folder gets a file.
WRITERS = ("fit", "sweep", "attribution", "heads", "interchange", "extract")
#: Options that say how a run is shown, not what it does.
_NOT_KEPT = ("--config", "--debug", "--quiet", "--json", "--help")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE]-?\d+)?")


def with_config(words: Sequence[str], parser: SuggestingParser) -> list[str]:
    """The words of the command line with those of the file that `--config` names put before them.

    Raises:
        ValueError: the file is not TOML or JSON, belongs to another command, or has an unknown key or a value that
            cannot be written on a command line.
        OSError: it cannot be read.
    """
    command, depth = parser.subparser(words)
    name, own = " ".join(words[:depth]), list(words[depth:])
    path = next((value for option, value in _given(own, command) if option == "--config"), None)
    if not isinstance(path, str):
        return list(words)
    given = {command.options[option] for option, _ in _given(own, command)}
    given |= command.exclusive_with(given)
    made = []
    for key, value in _read(Path(path), name).items():
        option = f"--{key.replace('_', '-')}"
        if option not in command.options or option in _NOT_KEPT:
            known = [known.removeprefix("--") for known in command.options if known not in _NOT_KEPT]
            raise ValueError(f"config: {path}: {key!r} is not an option of {name}{did_you_mean(key, known)}")
        action = command.options[option]
        if action not in given:
            made += list(_typed(option, value, action, path))
    return [*words[:depth], *made, *own]


def write_config(folder: Path, words: Sequence[str], parser: SuggestingParser) -> None:
    """Write the options of a run into its folder, so that `--config` repeats it; for a share of a sweep, the sweep."""
    command, depth = parser.subparser(words)
    table: dict[str, Any] = {}
    for option, value in _given(words[depth:], command):
        if option in (*_NOT_KEPT, "--points"):  # all jobs of a sweep write the same file
            continue
        key = option.removeprefix("--")
        if isinstance(command.options[option], argparse._AppendAction):
            table.setdefault(key, []).append(value)
        else:
            table[key] = value
    lines = [f"# Repeat this run: actscale-fast {' '.join(words[:depth])} --config {FILE}"]
    lines += [f"# Written by actscale-fast {__version__}.", f"command = {json.dumps(' '.join(words[:depth]))}"]
    lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    write_bytes(folder / FILE, ("\n".join(lines) + "\n").encode())


def given_options(words: Sequence[str], parser: SuggestingParser) -> list[str]:
    """The options among the words of a command line, in their order, such as "--out"."""
    command, depth = parser.subparser(words)
    return list(dict.fromkeys(option for option, _ in _given(words[depth:], command)))


def _given(words: Sequence[str], command: SuggestingParser) -> Iterator[tuple[str, str | bool]]:
    """(option, its text, or True for a flag) of the words that are options."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            return
        option, has_value, value = word.partition("=")
        action = command.options.get(option)
        if action is not None:
            yield option, True if action.nargs == 0 else value if has_value else next(rest, "")


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".json":
            table = json.loads(content)
        else:
            table = tomllib.loads(content.decode())
    except OSError as error:
        raise naming(error, path) from error
    except ValueError as error:  # of JSON, TOML or Unicode
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise ValueError(f"config: {path} is not {kind} ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"config: {path} holds a {type(table).__name__}, expected options by name")
    command = table.pop("command", name)
    if command != name:
        raise ValueError(f"config: {path} belongs to the command {command!r}, expected {name!r}")
    return table


def _typed(option: str, value: Any, action: argparse.Action, path: str) -> Iterator[str]:
    """The words that give an option the value of the file."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"config: {path}: {option} is {value!r}, expected true or false")
        if value:
            yield option
        return
    several = isinstance(action, argparse._AppendAction) and isinstance(value, list)
    for item in value if several else [value]:
        parts = item if isinstance(item, list) else [item]
        if not parts or not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts):
            raise ValueError(f"config: {path}: {option} is {value!r}, expected a text, a number or a list of them")
        yield f"{option}={','.join(map(str, parts))}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return "true"
    if _NUMBER.fullmatch(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
