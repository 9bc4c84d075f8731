""" "Did you mean …?" for names that are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: object, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most resembles, whatever its case and its hyphens; None: there is none."""
    if not isinstance(name, str):
        return None
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ "; did you mean 'head'?" as the end of an error message; "" where no known name resembles `name`."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"


def unknown_attribute(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error of a module that lacks an attribute, with a suggestion."""
    # Without name= and obj=, Python's own traceback adds no second suggestion.
    return AttributeError(f"module {module!r} has no attribute {name!r}{did_you_mean(name, known)}")


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
