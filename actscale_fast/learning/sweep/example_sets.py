"""The examples of a sweep: one set without a name, or several by name, each of which is a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...tasks.examples import Example
from ...tasks.loading import examples_from


def by_name(argument: str, examples: Any) -> dict[str | None, Sequence[Example]]:
    """The sets by name; None is the name of a single one.

    Raises:
        TypeError, ValueError: not examples; the message names the argument, the set and the row.
    """
    sets = examples if isinstance(examples, Mapping) else {None: examples}
    if isinstance(examples, Mapping) and not (examples and all(isinstance(name, str) for name in examples)):
        raise ValueError(f"{argument}: got {list(examples)!r}, expected sets of examples by name")
    return {
        name: examples_from(some, argument if name is None else f"{argument}[{name!r}]") for name, some in sets.items()
    }


def row_ranges(sets: dict[str | None, Sequence[Example]]) -> dict[str | None, range]:
    """The rows of each set where all stand one after another."""
    ranges, start = {}, 0
    for name, some in sets.items():
        ranges[name] = range(start, start + len(some))
        start += len(some)
    return ranges
