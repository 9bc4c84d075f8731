"""Curves: answers flipped against the number of active scalars, and quantities against the strength."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import BLANK, FAINT, INK, headed, headed_axis, plain, series, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class PathPoint:
    """One intervention of a path from few to many active scalars."""

    n_active: float  # scalars (or parameters) that are not exactly zero
    to_correct: float  # share of examples with z[c] > z[w] under β = +1
    to_wrong: float  # share of examples with z[w] > z[c] under β = −1
    kl: float | None = None  # mean KL of the other tokens, in nats


Run = Sequence[PathPoint]
_FLIPS = {"to_correct": "to the correct answer, β = +1", "to_wrong": "to the wrong answer, β = −1"}
_KL = "KL of the other tokens, nats"


def path(
    curves: Mapping[str, Run | Sequence[Run]],
    path: str | os.PathLike[str] | None = None,
    *,
    kl: bool = False,
    log: bool = False,
    xlabel: str = "active scalars",
    title: str | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw the share of answers flipped against the number of active scalars.

    A single curve has both directions in one panel; several curves have a panel for each direction.

    Args:
        curves: the points of each named path, or those of several runs (seeds) of it: then their mean, over a band from
            the smallest to the largest value. Runs are interpolated linearly and compared where all have points.
        path, dpi: as in `heatmap`.
        kl: add a panel with the KL, which every point must then have.
        log: a logarithmic axis of active scalars; 0 is drawn at its left end.
        xlabel: what is counted.
        title: above the panels; None: no title.

    Raises:
        TypeError: something that is not a PathPoint.
        ValueError: no curve, one without points, a point without KL, or a suffix that is not a picture format.
    """
    from .figures import NotebookFigure

    runs = {name: _runs(name, given, kl) for name, given in curves.items()}
    if not runs:
        raise ValueError("curves: got none, expected at least one")
    alone = len(runs) == 1
    panels: list[tuple[str, tuple[str, ...]]] = [("flipped", tuple(_FLIPS))] if alone else []
    panels += [] if alone else [(label, (key,)) for key, label in _FLIPS.items()]
    panels += [(_KL, ("kl",))] if kl else []
    wide = {1: 5.6, 2: 8.4, 3: 10.2}[len(panels)]
    figure = NotebookFigure(figsize=(wide, 3.5 if alone else 3.8), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, keys) in zip(axes, panels, strict=True):
        for number, (name, parts) in enumerate(runs.items()):
            for turn, key in enumerate(keys):
                style = series(number + turn if alone else number)
                _curve(axis, parts, key, style, _FLIPS[key] if label == "flipped" else name, log)
        _finish(axis, "share flipped" if label == "flipped" else "", xlabel, log)
        if label != "flipped":
            axis.set_title(label, loc="left", fontsize=9.5, color=INK)
        axis.set_ylim(*((0,) if "kl" in keys else (-0.03, 1.03)))
    if not alone:
        axes[0].set_ylabel("share flipped")
    headed(figure, title, *axes[0].get_legend_handles_labels())
    return written(figure, path)


def strengths(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float] | Sequence[Sequence[float]]]],
    path: str | os.PathLike[str] | None = None,
    *,
    ylabel: str,
    xlabel: str = "strength β",
    log: bool = False,
    baseline: float | None = None,
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
        baseline: the frozen model's value, drawn as a line across.
        title: above the picture; None: no title.
        ax: draw into these axes instead of a new figure; their figure is returned, and written where a path is given.

    Raises:
        ValueError: no curve, a curve without values or with more or fewer values than strengths, values that are not
            positive on a logarithmic axis, or a suffix that is not a picture format.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from .figures import one_axis

    if not curves:
        raise ValueError("curves: got none, expected at least one")
    figure, axis = one_axis(ax, figsize=(5.8, 3.7), dpi=dpi)
    for number, (name, (x, y)) in enumerate(curves.items()):
        colour, mark = series(number)
        places, values = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
        if not places.size or values.ndim != 2 or values.shape[1] != places.size:
            raise ValueError(
                f"curves: {name!r} has {places.size} strengths and values of shape {np.shape(y)}, expected one value "
                "for each (and seed)"
            )
        if log and not (values > 0).all():
            raise ValueError(f"curves: {name!r} has values of 0 or less, which a logarithmic axis cannot show")
        order = places.argsort()
        _band(axis, places[order], values[:, order], colour, mark, name)
    if baseline is not None:
        axis.axhline(baseline, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        at = {"xy": (1, baseline), "xycoords": ("axes fraction", "data")}
        offset = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axis.annotate("frozen model", **at, **offset, fontsize=7.5, color=FAINT)  # type: ignore[arg-type]
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    low, high = axis.get_xlim()
    if low < 0 < high:
        axis.axvline(0, color=BLANK, linewidth=1.4, zorder=0)
    _finish(axis, ylabel, xlabel, False)
    names = axis.get_legend_handles_labels() if len(curves) > 1 else ()
    headed(figure, title, *names) if ax is None else headed_axis(axis, title, *names)
    return written(figure, path)


def _runs(name: str, given: Any, kl: bool) -> list[list[PathPoint]]:
    """The runs of one curve, their points sorted by the number of active scalars."""
    many = bool(given) and not isinstance(given[0], PathPoint)
    runs = [sorted(run, key=_n_active) for run in (given if many else [given])]
    if not runs or not all(runs):
        raise ValueError(f"curves: {name!r} has a run without points, expected at least one")
    if kl and any(point.kl is None for run in runs for point in run):
        raise ValueError(f"curves: {name!r} has points without kl, expected it of all")
    return runs


def _n_active(point: Any) -> float:
    if not isinstance(point, PathPoint):
        raise TypeError(f"curves: got {type(point).__name__}, expected a PathPoint")
    return point.n_active


def _curve(axis: Axes, runs: list[list[PathPoint]], key: str, style: tuple[str, str], label: str, log: bool) -> None:
    places = [np.array([point.n_active for point in run]) for run in runs]
    values = [np.array([getattr(point, key) for point in run], dtype=float) for run in runs]
    low, high = max(x.min() for x in places), min(x.max() for x in places)
    grid = np.unique(np.concatenate([x[(x >= low) & (x <= high)] for x in places] + [[low, high]]))
    scale = np.log1p if log else np.asarray
    # np.interp needs increasing places: of points with equally many active scalars the last one counts.
    rows = [np.interp(scale(grid), scale(x), y) for x, y in map(_distinct, places, values)]
    _band(axis, grid, np.stack(rows), *style, label, marked=len(runs) == 1)


def _distinct(x: Any, y: Any) -> tuple[Any, Any]:
    last = np.append(np.diff(x) > 0, True)
    return x[last], y[last]


def _band(axis: Axes, x: Any, rows: Any, colour: str, mark: str, label: str, marked: bool = True) -> None:
    """Draw the mean of rows [R, X] over a band from the smallest to the largest value."""
    if len(rows) > 1:
        axis.fill_between(x, rows.min(0), rows.max(0), color=colour, alpha=0.16, linewidth=0)
    every = max(len(x) // 8, 1)  # marks tell curves apart; a mean does not need one at every point
    axis.plot(
        x, rows.mean(0), color=colour, marker=mark, markersize=4.2, linewidth=1.7, label=label,
        markevery=1 if marked else every, markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


def _finish(axis: Axes, ylabel: str, xlabel: str, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if log:
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    plain(axis, grid="y")
