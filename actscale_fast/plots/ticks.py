"""The ends of an axis, which leave room for whole markers, and the labels of a logarithmic one."""

from __future__ import annotations

import math
from typing import Any

_MOST = 7  # labels of a logarithmic axis


def short(value: float, _: object = None) -> str:
    """1000 as 1k, 0.01 unchanged."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def padded(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    """The ends of a linear axis that shows low to high with room for the markers at both."""
    room = share * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def linear_ticks(axis: Any, most: int, *, integer: bool = False) -> None:
    """At most so many intervals between the labels of an XAxis or YAxis, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(
        MaxNLocator(most, steps=[1, 2, 2.5, 5, 10] if not integer else [1, 2, 5, 10], integer=integer)
    )


def log_ticks(low: float, high: float) -> list[float]:
    """At least three numbers from low to high: powers of ten, also 3 or 2 and 5 times them, or equally spaced."""
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / _MOST)]
    even = MaxNLocator(5, min_n_ticks=3).tick_values(low, high)
    return [float(tick) for tick in even if low <= tick <= high]


def log_axis(axis: Any, values: Any, label: Any = short) -> None:
    """Make an XAxis or YAxis logarithmic, with room for the markers at both ends; if a value is 0, 0 is shown too.

    Args:
        axis: the XAxis or YAxis.
        values: the values that it shows, none below 0.
        label: writes a number.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    has_zero = any(value == 0 for value in values)
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    room = max((high / low) ** 0.06, 1.15)
    which = axis.axis_name
    scale, limits = (getattr(axis.axes, f"set_{which}{name}") for name in ("scale", "lim"))
    if has_zero:
        decade = 10.0 ** math.floor(math.log10(low))
        scale("symlog", linthresh=decade, linscale=0.5)
        limits(-0.25 * decade, high * room)
    else:
        decade = low / room
        scale("log")
        limits(decade, high * room)
    # Beside a 0, several labels within so little of a decade would overlap.
    ticks = [decade] if has_zero and high * room < 2 * decade else log_ticks(decade, high * room)
    axis.set_major_locator(FixedLocator([0.0] * has_zero + ticks))
    axis.set_major_formatter(FuncFormatter(label))
    powers = range(math.floor(math.log10(decade)), math.ceil(math.log10(high * room)))
    # Small ticks at 2, 3, … show that the axis is logarithmic; without a whole decade they would only confuse.
    wide = 10 * decade <= high * room and len(powers) <= 6
    every = [factor * 10.0**power for power in powers for factor in range(1, 10)] if wide else []
    axis.set_minor_locator(FixedLocator(every))
    axis.set_minor_formatter(NullFormatter())
