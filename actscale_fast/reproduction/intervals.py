"""Bootstrap intervals over seeds and prompts, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

#: Resamples, coverage and seed of every interval, as in `learning/bootstrap.py`.
RESAMPLES, COVERAGE, SEED = 2000, 0.95, 0

Verdict = Literal["held", "not held", "not decided", "not tested"]
Columns = Mapping[str, Sequence[float]]


def in_form(number: float, form: str) -> str:
    """A number as text, with a true minus sign and no sign before a zero."""
    text = form.format(number)
    return (text.lstrip("+-") if not any(digit in text for digit in "123456789") else text).replace("-", "−")


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, form: str = "{:.2f}") -> str:
        """The value, with the interval in brackets where it has a width."""
        value, low, high = (in_form(number, form) for number in (self.value, self.low, self.high))
        return value if low == high else f"{value} [{low}, {high}]"

    def at_least(self, bound: float) -> Verdict:
        """Whether the figure is at least this large: undecided where the bound lies within the interval."""
        return "held" if self.low >= bound else "not held" if self.high < bound else "not decided"

    def at_most(self, bound: float) -> Verdict:
        """Whether the figure is at most this large."""
        return "held" if self.high <= bound else "not held" if self.low > bound else "not decided"


def interval(runs: Sequence[Columns], statistic: Callable[[Mapping[str, Any]], Any]) -> Interval:
    """A statistic of means over seeds and prompts, with its two-level bootstrap interval (the percentile method).

    Each resample draws as many seeds as there are, and for each of them its prompts, with replacement. Columns of one
    run belong to the same prompts and are drawn together, so that differences between systems are paired. With one
    seed only the prompts vary; if all prompts agree, the interval has no width.

    Args:
        runs: for each seed, columns by name, all of one length: a value per prompt, or a single value per seed.
        statistic: maps the means of the columns, by name, to a number; it also gets arrays of them.
    """
    names = list(runs[0])
    tables = [np.stack([np.asarray(run[name], dtype=float) for name in names], -1) for run in runs]  # [N, columns]
    means = np.mean([table.mean(0) for table in tables], 0)
    rng = np.random.default_rng(SEED)
    drawn = np.zeros((RESAMPLES, len(names)))
    for _ in tables:  # one seed of the resample after another
        seeds = rng.integers(len(tables), size=RESAMPLES)
        for number, table in enumerate(tables):
            mine = np.flatnonzero(seeds == number)
            prompts = rng.integers(len(table), size=(len(mine), len(table)))
            drawn[mine] += table[prompts].mean(1)
    drawn /= len(tables)
    values = np.asarray(statistic(dict(zip(names, drawn.T, strict=True))), dtype=float)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(statistic(dict(zip(names, means, strict=True)))), float(low), float(high))


def mean(runs: Sequence[Sequence[float]]) -> Interval:
    """The mean over seeds and prompts."""
    return interval([{"x": run} for run in runs], lambda means: means["x"])


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim with several parts: one that is not held decides, then one that is not decided."""
    order: tuple[Verdict, ...] = ("not held", "not tested", "not decided")
    return next((verdict for verdict in order if verdict in verdicts), "held")
