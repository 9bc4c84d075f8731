"""Types of command-line values: each converts a text, or raises an error that says what was expected."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence

_RANGE = re.compile(r"(\d+)-(\d+)")
_INTEGER = re.compile(r"-?\d+")
_COLUMN = re.compile(r"(\w+)=(.+)", re.DOTALL)
_SIGNED_LISTS = ("--layers", "--positions", "--strength", "--factors")


def layer_list(text: str) -> list[int]:
    """ "0,3,10-19,-1" as numbers; a range includes both ends, a negative number counts from the last layer."""
    return _integers(text, "layers", ranges=True)


def position_list(text: str) -> list[int]:
    """ "0,-1" as numbers, negative from the end of the prompt."""
    return _integers(text, "positions", ranges=False)


def site_list(text: str) -> list[str]:
    """ "attn_out,mlp_out" as names, which are checked when the model is known."""
    return [part.strip() for part in text.split(",")]


def strength_list(text: str) -> list[float]:
    """ "-1,0,1" as numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers separated by commas, such as -1,0,1")
    return numbers


def weight_list(text: str) -> list[float]:
    """ "0.4,0.2" as numbers that are at least 0."""
    return [weight(part) for part in text.split(",")]


def minimality_list(text: str) -> list[float | str]:
    """ "0.4,10%" as numbers and shares."""
    return [minimality(part) for part in text.split(",")]


def rate_list(text: str) -> list[float | str]:
    """ "0.05,2%" as numbers above 0 and shares."""
    return [rate(part) for part in text.split(",")]


def seed_list(text: str) -> list[int]:
    """ "0-4,7" as numbers; a range includes both ends."""
    return _integers(text, "seeds", ranges=True)


def count_list(text: str) -> list[int]:
    """ "5,10,20" as whole numbers that are at least 1."""
    return [positive_int(part.strip()) for part in text.split(",")]


def name_list(text: str) -> list[str]:
    """ "juice,sami" as names, which are checked when the command runs."""
    return [part.strip() for part in text.split(",")]


def named_value(text: str) -> tuple[str, object]:
    """ "steps=30" as a name and a value: JSON, or else a text."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE, such as steps=30")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def column_names(text: str) -> dict[str, str]:
    """ "correct=answer,wrong=foil" as names of columns by field."""
    found = {}
    for part in re.split(r",(?=\w+=)", text):  # a name may have a comma
        match = _COLUMN.fullmatch(part)
        if match is None:
            raise argparse.ArgumentTypeError(f"got {part!r}, expected FIELD=NAME such as correct=answer")
        found[match[1]] = match[2]
    return found


def positive_int(text: str) -> int:
    """A whole number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number that is at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "a number above 0", least=0.0, open_end=True)


def weight(text: str) -> float:
    """A finite number that is at least 0."""
    return _number(text, "a number that is at least 0", least=0.0, open_end=False)


def minimality(text: str) -> float | str:
    """A finite number that is at least 0, or a share such as "10%"."""
    if "%" not in text:
        return _number(text, "a number that is at least 0, or a share such as 10%", least=0.0, open_end=False)
    share = "".join(text.split())
    if not 0 <= _number(share.removesuffix("%"), "a share such as 10%", least=0.0, open_end=False) <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share from 0% to 100%")
    return share


def rate(text: str) -> float | str:
    """A finite number above 0, or a share such as "5%"."""
    if "%" not in text:
        return _number(text, "a number above 0, or a share such as 5%", least=0.0, open_end=True)
    share = "".join(text.split())
    if _number(share.removesuffix("%"), "a share such as 5%", least=0.0, open_end=True) > 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share of at most 100%")
    return share


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = _number(text, "a number above 0 and at most 1", least=0.0, open_end=True)
    if number > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return number


def joined_signed_lists(arguments: Sequence[str]) -> list[str]:
    """`--strength -1,0,1` as `--strength=-1,0,1`: argparse mistakes a text that begins with a minus for an option."""
    joined: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return joined + list(arguments[position:])
        if joined and joined[-1] in _SIGNED_LISTS and re.match(r"-[\d.]", argument):
            joined[-1] = f"{joined[-1]}={argument}"
        else:
            joined.append(argument)
    return joined


def _integers(text: str, what: str, *, ranges: bool) -> list[int]:
    numbers: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        span = _RANGE.fullmatch(part) if ranges else None
        if span and int(span[1]) <= int(span[2]):
            numbers.extend(range(int(span[1]), int(span[2]) + 1))
        elif _INTEGER.fullmatch(part):
            numbers.append(int(part))
        else:
            example = "0,3,10-19,-1" if ranges else "0,1,-1"
            raise argparse.ArgumentTypeError(f"got {part!r} in {text!r}, expected {what} such as {example}")
    return numbers


def _number(text: str, expected: str, *, least: float, open_end: bool) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < least or (open_end and number == least):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return number
