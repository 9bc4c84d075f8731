"""Curves: answers flipped against the number of active scalars."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import DASHES, FAINT, FROZEN, headed, panel_title, series, written
from .lines import band, curve_names, finish
from .ticks import log_axis, padded

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
_FLIPS = {"to_correct": "correct above wrong, β = +1", "to_wrong": "wrong above correct, β = −1"}
_SHARE = "share of prompts"
_KL = "KL of the other tokens"


def path(
    curves: Mapping[str, Run | Sequence[Run]],
    path: str | os.PathLike[str] | None = None,
    *,
    kl: bool = False,
    log: bool = False,
    xlabel: str = "active scalars (not 0)",
    baseline: PathPoint | Mapping[str, PathPoint] | None = None,
    title: str | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw the share of prompts whose answer is the steered one against the number of active scalars.

    A single curve has both directions in one panel; several curves have a panel for each direction.

    Args:
        curves: the points of each named path, or those of several runs (seeds) of it: then their mean, over a band from
            the smallest to the largest value. Runs are interpolated linearly and compared where all have points.
        path, dpi: as in `heatmap`.
        kl: add a panel with the KL, which every point must then have.
        log: a logarithmic axis of active scalars; 0 is drawn at its left end.
        xlabel: what is counted.
        baseline: the frozen model's shares as a point, or one for each curve by its name; drawn as dashed lines.
        title: above the panels; None: no title.
        ax: draw into these axes instead of a new figure, one for each panel; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: something that is not a PathPoint, or `ax` has something that is not a matplotlib Axes.
        ValueError: no curve, one without points, a point without KL, a baseline of an unknown curve, more or fewer axes
            than panels, or a suffix that is not a picture format.
    """
    from .figures import panels

    runs = {name: _runs(name, given, kl) for name, given in curves.items()}
    if not runs:
        raise ValueError("curves: got none, expected at least one")
    frozen = _baselines(baseline, runs)
    alone = len(runs) == 1
    shown: list[tuple[str, tuple[str, ...]]] = [(_SHARE, tuple(_FLIPS))] if alone else []
    shown += [] if alone else [(label, (key,)) for key, label in _FLIPS.items()]
    shown += [(_KL, ("kl",))] if kl else []
    size = ({1: 5.8, 2: 9.0, 3: 11.4}[len(shown)], 3.7 if alone else 4.0)
    figure, axes = panels(ax, 1, len(shown), figsize=size, dpi=dpi)
    for axis, (label, keys) in zip(axes, shown, strict=True):
        for number, (name, parts) in enumerate(runs.items()):
            for turn, key in enumerate(keys):
                style = series(number + turn if alone else number)
                _curve(axis, parts, key, style, _FLIPS[key] if label == _SHARE else name, log)
                if name in frozen and key != "kl":
                    colour = FAINT if isinstance(baseline, PathPoint) and not alone else style[0]
                    axis.axhline(getattr(frozen[name], key), color=colour, linewidth=1.3, linestyle=DASHES, zorder=1)
        finish(axis, "nats" if label == _KL else _SHARE if axis is axes[0] else "", xlabel)
        if log:
            counts = [point.n_active for parts in runs.values() for run in parts for point in run]
            log_axis(axis.xaxis, [0.0, 1.0, *(count for count in counts if count >= 1)], "{:,.0f}".format)
        if label != _SHARE:
            panel_title(axis, label)
        largest = axis.dataLim.ymax
        axis.set_ylim(*(padded(0, largest if largest > 0 else 1) if "kl" in keys else padded(0, 1)))
    handles, labels = curve_names(axes[0], runs.values())
    if frozen:
        handles.append(_line(FAINT))
        labels.append(FROZEN)
    headed(axes, title, handles, labels, own=ax is None)
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
    band(axis, grid, np.stack(rows), *style, label, marked=len(runs) == 1)


def _distinct(x: Any, y: Any) -> tuple[Any, Any]:
    last = np.append(np.diff(x) > 0, True)
    return x[last], y[last]


def _baselines(given: Any, runs: Mapping[str, Any]) -> dict[str, PathPoint]:
    """The frozen model's point for each curve that has one."""
    if given is None:
        return {}
    points = dict(given) if isinstance(given, Mapping) else dict.fromkeys(runs, given)
    for name, point in points.items():
        if name not in runs:
            raise ValueError(f"baseline: got {name!r}, expected some of {', '.join(runs)}")
        if not isinstance(point, PathPoint):
            raise TypeError(f"baseline: got {type(point).__name__}, expected a PathPoint")
    return points


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=1.3, linestyle=DASHES)
