"""Systems side by side: a row for each system, a panel for each metric."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .drawing import FAINT, FROZEN, headed, ink, panel_title, plain, series, written
from .ticks import linear_ticks, log_axis, padded

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
    baseline: float | None = None  # the frozen model's value on the same prompts, drawn as an upright line
    interval: tuple[float, float] | None = None  # drawn in place of the range of the values


def comparison(
    rows: Sequence[Measured],
    path: str | os.PathLike[str] | None = None,
    *,
    log: Collection[str] = (),
    title: str | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw each system's metrics in a row: the mean, and a line from the smallest to the largest value.

    Systems, metrics and groups keep the order in which they first occur. A row with a `baseline` has an upright line at
    the frozen model's value.

    Args:
        rows: the measurements; a system may lack a metric.
        path, dpi: as in `heatmap`.
        log: the metrics with a logarithmic axis; 0 is drawn at its left end.
        title: above the panels; None: no title.
        ax: draw into these axes instead of a new figure, one for each metric; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: `ax` has something that is not a matplotlib Axes.
        ValueError: no rows, a row without values or with one that is not finite, a metric in `log` that does not occur
            or has values below 0, more or fewer axes than metrics, or a suffix that is not a picture format.
    """
    from .figures import panels

    systems, metrics, groups = _checked(rows, log)
    height = (
        1.0 + 0.3 * (len(groups) > 1) + 0.3 * (title is not None) + (0.28 + 0.12 * (len(groups) - 1)) * len(systems)
    )
    figure, axes = panels(
        ax, 1, len(metrics), name="metric", figsize=(min(2.4 + 2.4 * len(metrics), 12), height), dpi=dpi
    )
    for axis, metric in zip(axes, metrics, strict=True):
        of_metric = [row for row in rows if row.metric == metric]
        for row in of_metric:
            number = groups.index(row.group)
            colour, mark = series(number)
            place = systems.index(row.system) + 0.36 * (number - (len(groups) - 1) / 2) / max(len(groups) - 1, 1)
            mean = sum(row.values) / len(row.values)
            if row.baseline is not None:
                axis.vlines(row.baseline, place - 0.15, place + 0.15, color=FAINT, linewidth=1.8)
            axis.plot(_ends(row), [place] * 2, color=colour, linewidth=1.8, alpha=0.6)
            axis.plot([mean], [place], mark, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)
        shown = [value for row in of_metric for value in (*row.values, *_ends(row))]
        shown += [row.baseline for row in of_metric if row.baseline is not None]
        _scale(axis, shown, metric in log)
        panel_title(axis, metric)
        plain(axis, grid="yx")
        axis.spines["left"].set_visible(False)
        axis.set_yticks(range(len(systems)), systems if axis is axes[0] else [""] * len(systems), color=ink(axis))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(systems) - 0.45, -0.55)
    headed(axes, title, *_names(rows, groups), own=ax is None, beneath=True)
    return written(figure, path)


def _ends(row: Measured) -> tuple[float, float]:
    return row.interval or (min(row.values), max(row.values))


def _checked(rows: Sequence[Measured], log: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """The systems, metrics and groups of the rows."""
    if not rows:
        raise ValueError("rows: got none, expected at least one")
    for row in rows:
        if not row.values or not all(map(math.isfinite, (*row.values, *(row.interval or ())))):
            raise ValueError(f"rows: {row.system!r}, {row.metric!r} has the values {row.values}, expected finite ones")
        if row.baseline is not None and not math.isfinite(row.baseline):
            raise ValueError(
                f"rows: {row.system!r}, {row.metric!r} has the baseline {row.baseline}, expected a finite one"
            )
        if row.metric in log and min(*row.values, row.baseline or 0) < 0:
            raise ValueError(f"log: {row.metric!r} has values below 0, which a logarithmic axis cannot show")
    metrics = list(dict.fromkeys(row.metric for row in rows))
    if not set(log) <= set(metrics):
        raise ValueError(f"log: got {sorted(log)}, expected some of {metrics}")
    return list(dict.fromkeys(row.system for row in rows)), metrics, list(dict.fromkeys(row.group for row in rows))


def _scale(axis: Axes, values: list[float], log: bool) -> None:
    if log:
        log_axis(axis.xaxis, values)
        return
    low, high = min(values), max(values)
    axis.set_xlim(*padded(min(low, 0.0), max(high, 0.0), 0.06))
    linear_ticks(axis.xaxis, 5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))


def _names(rows: Sequence[Measured], groups: list[str]) -> tuple[list[object], list[str]]:
    """The handles and labels of the legend: the groups if there are several, and the frozen model."""
    from matplotlib.lines import Line2D

    labels = list(groups) if len(groups) > 1 else []
    handles: list[object] = []
    for number in range(len(labels)):
        colour, mark = series(number)
        handles.append(Line2D([], [], color=colour, marker=mark, linestyle="", markersize=5.5))
    if any(row.baseline is not None for row in rows):
        handles.append(Line2D([], [], color=FAINT, marker="|", linestyle="", markersize=9, markeredgewidth=2.2))
        labels.append(FROZEN)
    return handles, labels
