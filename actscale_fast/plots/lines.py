"""Curves: a quantity against the strength of interventions, and what all curves share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import DASHES, FAINT, FROZEN, TICKS, headed, plain, series, written
from .ticks import linear_ticks, log_axis, padded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def strengths(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float] | Sequence[Sequence[float]]]],
    path: str | os.PathLike[str] | None = None,
    *,
    ylabel: str,
    xlabel: str = "strength β",
    log: bool = False,
    ylim: tuple[float, float] | None = None,
    baseline: float | tuple[Sequence[float], Sequence[float]] | None = None,
    title: str | None = None,
    dpi: int = 160,
    ax: Axes | None = None,
) -> Figure:
    """Draw one quantity, such as a perplexity or a logit difference, against the strength of interventions.

    Args:
        curves: (strengths, values) by name, both of one length; or (strengths, values of each seed), drawn as their
            mean over a band from the smallest to the largest.
        path, dpi: as in `heatmap`.
        ylabel: the quantity, with its unit.
        xlabel: what is varied.
        log: a logarithmic axis for the quantity.
        ylim: what the axis shows at least, such as (0, 1) for shares, with room for markers at both ends; None: the
            range of the values.
        baseline: the frozen model's value, drawn as a dashed line across; or (places, values) where it changes with
            what is varied.
        title: above the picture; None: no title.
        ax: draw into these axes instead of a new figure; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: `ax` is not a matplotlib Axes.
        ValueError: no curve, a curve without values or with more or fewer values than strengths, values that are not
            positive on a logarithmic axis, an empty range in `ylim`, or a suffix that is not a picture format.
    """
    from .figures import panels

    if not curves:
        raise ValueError("curves: got none, expected at least one")
    if ylim is not None and not ylim[0] < ylim[1]:
        raise ValueError(f"ylim: got {ylim}, expected a smaller and a larger number")
    figure, (axis,) = panels(ax, 1, 1, figsize=(5.8, 3.7), dpi=dpi)
    rows = {}
    for number, (name, (x, y)) in enumerate(curves.items()):
        places, values = rows[name] = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
        if not places.size or values.ndim != 2 or values.shape[1] != places.size:
            raise ValueError(
                f"curves: {name!r} has {places.size} strengths and values of shape {np.shape(y)}, expected one value "
                "for each (and seed)"
            )
        if log and not (values > 0).all():
            raise ValueError(f"curves: {name!r} has values of 0 or less, which a logarithmic axis cannot show")
        order = places.argsort()
        band(axis, places[order], values[:, order], *series(number), name)
    finish(axis, ylabel, xlabel)
    every = [*np.concatenate([values.ravel() for _, values in rows.values()]), *(ylim or ())]
    handles, labels = curve_names(axis, [values for _, values in rows.values()])
    if baseline is not None:
        line, frozen = _frozen_line(axis, baseline)
        every += frozen
        if ax is None:  # at the right edge, where no curve passes
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            words: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": TICKS, "color": FAINT}
            axis.annotate(FROZEN, (1.0, frozen[-1]), (3, 0), **place, **words)
        else:
            handles, labels = [*handles, line], [*labels, FROZEN]
    if log:
        log_axis(axis.yaxis, [value for value in every if value > 0])
    else:
        axis.set_ylim(*padded(min(every), max(every)))
    shown = np.concatenate([places for places, _ in rows.values()])
    if shown.min() < 0 < shown.max():
        axis.axvline(0, color=FAINT, alpha=0.3, linewidth=1.4, zorder=0)
    headed([axis], title, handles, labels, own=ax is None)
    return written(figure, path)


def _frozen_line(axis: Axes, baseline: float | tuple[Sequence[float], Sequence[float]]) -> tuple[Any, list[float]]:
    """Draw the frozen model's value, or values, as a dashed line; return the line and the values from left to right."""
    style: dict[str, Any] = {"color": FAINT, "linewidth": 1.3, "linestyle": DASHES, "zorder": 1}
    if not isinstance(baseline, tuple):
        return axis.axhline(baseline, **style), [float(baseline)]
    x, y = (np.asarray(one, dtype=float) for one in baseline)
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise ValueError(f"baseline: got {x.shape} places and {y.shape} values, expected equally many")
    order = x.argsort()
    return axis.plot(x[order], y[order], **style)[0], y[order].tolist()


def band(axis: Axes, x: Any, rows: Any, colour: str, mark: str, label: str, marked: bool = True) -> None:
    """Draw the mean of rows [R, X] over a band from the smallest to the largest value."""
    if len(rows) > 1:
        axis.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.16, linewidth=0)
    every = max(len(x) // 8, 1)  # marks tell curves apart; a mean does not need one at every point
    axis.plot(
        x, rows.mean(0), color=colour, marker=mark, markersize=5, linewidth=1.8, label=label,
        markevery=1 if marked else every, markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


def finish(axis: Axes, ylabel: str, xlabel: str) -> None:
    linear_ticks(axis.xaxis, 7)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    plain(axis, grid="y")


def curve_names(axis: Axes, rows: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """The names of the curves if there are several, and what a band is."""
    from matplotlib.patches import Patch

    handles, labels = axis.get_legend_handles_labels()
    numbers = {len(one) for one in rows} - {1}
    if len(handles) == 1:
        handles, labels = ([], []) if not numbers else (handles, [f"{labels[0]}, mean"])
    if numbers:
        of = f"{numbers.pop()} seeds" if len(numbers) == 1 else "the seeds"
        handles.append(Patch(color=FAINT, alpha=0.3, linewidth=0))
        labels.append(f"band: smallest to largest of {of}")
    return list(handles), list(labels)
