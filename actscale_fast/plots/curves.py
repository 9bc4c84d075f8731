"""How an intervention was learned: the terms of the objective at each step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .._json import LARGEST, parsed_sealed, read_limited
from .._suggestions import did_you_mean
from .drawing import headed, ink, panel_title, plain, series, written
from .ticks import linear_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, float]]


class Learned(Protocol):
    """The result of a fit."""

    @property
    def history(self) -> list[dict[str, float]]: ...


_TERMS = {
    "effectiveness": "effectiveness  E",
    "faithfulness": "faithfulness  F",
    "minimality": "minimality  ‖α‖₁",
    "n_active": "active scalars (not 0)",
}


def history(
    result: Learned | Records | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    terms: str | Sequence[str] | None = None,
    title: str | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw the three terms of the objective and the number of active scalars over the steps of a fit.

    Args:
        result: the result of a fit, its `.history`, or a JSON file with such a list.
        path, dpi: as in `heatmap`.
        terms: what to draw, one or several of "effectiveness", "faithfulness", "minimality", "n_active"; None: all
            four. Each has a panel.
        title: above the panels; None: no title.
        ax: draw into these axes instead of a new figure, one for each term; see `heatmap`.

    Returns:
        The figure.

    Raises:
        ValueError: no steps, a step without one of the terms, an unknown term, more or fewer axes than terms, or a
            suffix that is not a picture format.
        TypeError: `ax` has something that is not a matplotlib Axes.
        FileNotFoundError: there is no such file.

    Example::

        plots.history(result)
        plots.history(result, terms="effectiveness", ax=axis)
    """
    from .figures import panels

    records, names = _records(result), _chosen(terms)
    rows, columns = (2, 2) if len(names) == 4 and ax is None else (1, len(names))
    figure, axes = panels(
        ax, rows, columns, name="term", share={"sharex": True}, figsize=(4.2 * columns, 2.3 * rows), dpi=dpi
    )
    steps = [record["step"] for record in records]
    for axis, key in zip(axes, names, strict=True):
        values, (colour, _) = [record[key] for record in records], series(list(_TERMS).index(key))
        axis.plot(steps, values, color=colour, linewidth=1.8, solid_capstyle="round")
        axis.fill_between(steps, values, color=colour, alpha=0.12, linewidth=0)
        axis.plot(steps[-1:], values[-1:], "o", color=colour, markersize=5, clip_on=False)
        last = f"{values[-1]:.0f}" if key == "n_active" else f"{values[-1]:.3g}"
        panel_title(axis, _TERMS[key])
        panel_title(axis, last, loc="right", fontweight="bold")
        axis.margins(x=0.015, y=0.12)
        if min(values) >= 0:
            axis.set_ylim(bottom=0)
        linear_ticks(axis.xaxis, 6, integer=True)
        linear_ticks(axis.yaxis, 4)
        plain(axis, grid="y")
    for axis in axes[-columns:]:
        axis.set_xlabel("step", color=ink(axis))
    headed(axes, title, own=ax is None)
    return written(figure, path)


def _chosen(terms: str | Sequence[str] | None) -> list[str]:
    names = list(_TERMS) if terms is None else [terms] if isinstance(terms, str) else list(terms)
    for name in names:
        if name not in _TERMS:
            raise ValueError(f"terms: got {name!r}, expected some of {', '.join(_TERMS)}{did_you_mean(name, _TERMS)}")
    if not names:
        raise ValueError(f"terms: got none, expected some of {', '.join(_TERMS)}")
    return names


def _records(result: Learned | Records | str | os.PathLike[str]) -> list[dict[str, float]]:
    if isinstance(result, str | os.PathLike):
        file = Path(result)
        try:
            records, _ = parsed_sealed(read_limited(file, LARGEST), finite=False)
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
    else:
        records = getattr(result, "history", result)
    wanted = {"step", *_TERMS}
    if not isinstance(records, Sequence) or not records:
        raise ValueError("history: got no steps, expected the history of a fit")
    if not all(isinstance(record, dict) and wanted <= record.keys() for record in records):
        raise ValueError(f"history: expected a record with {', '.join(sorted(wanted))} for every step")
    return list(records)
