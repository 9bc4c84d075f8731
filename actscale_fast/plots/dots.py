"""Systems side by side: a row for each system, a panel for each metric."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .drawing import INK, headed, plain, series, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric of one system."""

    system: str
    metric: str
    values: tuple[float, ...]  # one per seed
    group: str = ""  # for example "training" or "held out"; groups share the system's row


def comparison(
    rows: Sequence[Measured],
    path: str | os.PathLike[str] | None = None,
    *,
    log: Collection[str] = (),
    title: str | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw each system's metrics in a row: the mean, and a line from the smallest to the largest value.

    Systems, metrics and groups keep the order in which they first occur.

    Args:
        rows: the measurements; a system may lack a metric.
        path, dpi: as in `heatmap`.
        log: the metrics with a logarithmic axis; 0 is drawn at its left end.
        title: above the panels; None: no title.

    Raises:
        ValueError: no rows, a row without values or with one that is not finite, a metric in `log` that does not occur
            or has values below 0, or a suffix that is not a picture format.
    """
    from matplotlib.lines import Line2D

    from .figures import NotebookFigure

    if not rows:
        raise ValueError("rows: got none, expected at least one")
    for row in rows:
        if not row.values or not all(map(math.isfinite, row.values)):
            raise ValueError(f"rows: {row.system!r}, {row.metric!r} has the values {row.values}, expected finite ones")
    systems, metrics, groups = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("system", "metric", "group")
    )
    if not set(log) <= set(metrics):
        raise ValueError(f"log: got {sorted(log)}, expected some of {metrics}")
    height = (
        0.95 + 0.25 * (len(groups) > 1) + 0.25 * (title is not None) + (0.26 + 0.12 * (len(groups) - 1)) * len(systems)
    )
    figure = NotebookFigure(figsize=(min(2.2 + 2.4 * len(metrics), 11), height), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        of_metric = [row for row in rows if row.metric == metric]
        for row in of_metric:
            number = groups.index(row.group)
            colour, mark = series(number)
            place = systems.index(row.system) + 0.36 * (number - (len(groups) - 1) / 2) / max(len(groups) - 1, 1)
            mean = sum(row.values) / len(row.values)
            axis.plot([min(row.values), max(row.values)], [place] * 2, color=colour, linewidth=1.6, alpha=0.6)
            axis.plot([mean], [place], mark, color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
        _scale(axis, metric, [value for row in of_metric for value in row.values], metric in log)
        axis.set_title(metric, loc="left", fontsize=9, color=INK)
        plain(axis, grid="yx")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(systems)), systems, fontsize=8.5)
    axes[0].set_ylim(len(systems) - 0.45, -0.55)
    marks = [series(number) for number in range(len(groups))] if len(groups) > 1 else []
    handles = [Line2D([], [], color=colour, marker=mark, linestyle="", markersize=5) for colour, mark in marks]
    headed(figure, title, handles, groups if marks else ())
    return written(figure, path)


def _scale(axis: Axes, metric: str, values: list[float], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = min(values), max(values)
    if not log:
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.margins(x=0.08)
        if low >= 0:
            axis.set_xlim(left=-0.04 * (high or 1))
        return
    if low < 0:
        raise ValueError(f"log: {metric!r} has values below 0, which a logarithmic axis cannot show")
    positive = [value for value in values if value > 0] or [1.0]
    decade = 10.0 ** math.floor(math.log10(min(positive)))
    if low == 0:
        axis.set_xscale("symlog", linthresh=decade, linscale=0.5)
        axis.set_xlim(-0.25 * decade, 2 * max(positive))
    else:
        axis.set_xscale("log")
        axis.set_xlim(min(positive) / 1.6, 1.6 * max(positive))
    axis.xaxis.set_major_formatter(FuncFormatter(_short))
    if decade * 1e4 < max(positive):  # room for every second decade only
        powers = range(round(math.log10(decade)), math.floor(math.log10(max(positive))) + 1, 2)
        axis.xaxis.set_major_locator(FixedLocator([0.0] * (low == 0) + [10.0**power for power in powers]))


def _short(value: float, _: object = None) -> str:
    """1000 as 1k, 0.01 unchanged."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
