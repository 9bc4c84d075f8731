"""Checks of the numbers that callers pass; every message names the argument."""

from __future__ import annotations

import math
import numbers
import re
from typing import TypeGuard

_SHARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


def is_real(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, including NumPy's scalars but not booleans."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's bool is not a Real


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer, including NumPy's but not booleans."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def finite_number(value: object) -> float | None:
    """`value` as a float, or None if it is not a finite number."""
    if not is_real(value):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        return None
    return number if math.isfinite(number) else None


def share_of(text: str) -> float | None:
    """A share such as "10%" as a number, here 0.1; None if the text is not one from 0% to 100%."""
    found = _SHARE.fullmatch(text)
    share = float(found[1]) / 100 if found else -1.0
    return share if 0 <= share <= 1 else None


def is_finite(value: object) -> bool:
    """Whether `value` is a finite number."""
    return finite_number(value) is not None


def check_finite(**values: object) -> None:
    """Raise a ValueError for the first value that is not a finite number."""
    for name, value in values.items():
        if not is_finite(value):
            raise ValueError(f"{name}: got {value!r}, expected a finite number")


def check_counts(**values: object) -> None:
    """Raise a ValueError for the first value that is not a positive integer."""
    for name, value in values.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def check_not_negative(**values: object) -> None:
    """Raise a ValueError for the first value that is not an integer >= 0."""
    for name, value in values.items():
        if not is_integer(value) or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected an integer that is at least 0")
