"""The examples of a sweep: one set without a name, or several by name, each of which is a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...tasks.examples import Example, check_examples


def by_name(argument: str, examples: Any) -> dict[str | None, Sequence[Example]]:
    """The sets by name; None is the name of a single one.

    Raises:
        TypeError, ValueError: not examples; the message names the argument and the set.
    """
    sets = examples if isinstance(examples, Mapping) else {None: examples}
    if isinstance(examples, Mapping) and not (examples and all(isinstance(name, str) for name in examples)):
        raise ValueError(f"{argument}: got {list(examples)!r}, expected sets of examples by name")
    checked: dict[str | None, Sequence[Example]] = {}
    for name, some in sets.items():
        if not isinstance(some, Iterable):
            raise TypeError(f"{argument}: got {type(some).__name__}, expected examples")
        try:
            checked[name] = check_examples(list(some))
        except (TypeError, ValueError) as error:
            where = argument if name is None else f"{argument}[{name!r}]"
            raise type(error)(str(error).replace("examples", where, 1)) from None
    return checked


def row_ranges(sets: dict[str | None, Sequence[Example]]) -> dict[str | None, range]:
    """The rows of each set where all stand one after another."""
    ranges, start = {}, 0
    for name, some in sets.items():
        ranges[name] = range(start, start + len(some))
        start += len(some)
    return ranges
