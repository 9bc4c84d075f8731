"""How an intervention was learned: the terms of the objective at each step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .._json import LARGEST, parsed_sealed, read_limited
from .drawing import INK, plain, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[dict[str, float]]


class Learned(Protocol):
    """The result of a fit."""

    @property
    def history(self) -> list[dict[str, float]]: ...


_TERMS = (
    ("effectiveness", "effectiveness  E", "#3b6fb6"),
    ("faithfulness", "faithfulness  F", "#c8553d"),
    ("minimality", "minimality  ‖α‖₁", "#5a9367"),
    ("n_active", "active scalars", "#7a5c9e"),
)


def history(
    result: Learned | Records | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw the three terms of the objective and the number of active scalars over the steps of a fit.

    Args:
        result: the result of a fit, its `.history`, or a JSON file with such a list.
        path, dpi: as in `heatmap`.
        title: above the four panels; None: no title.

    Raises:
        ValueError: no steps, a step without one of the terms, or a suffix that is not a picture format.
        FileNotFoundError: there is no such file.
    """
    from matplotlib.ticker import MaxNLocator

    from .figures import NotebookFigure

    records = _records(result)
    figure = NotebookFigure(figsize=(8.4, 4.6), dpi=dpi, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    steps = [record["step"] for record in records]
    for axis, (key, label, colour) in zip(axes, _TERMS, strict=True):
        values = [record[key] for record in records]
        axis.plot(steps, values, color=colour, linewidth=1.8, solid_capstyle="round")
        axis.fill_between(steps, values, color=colour, alpha=0.12, linewidth=0)
        axis.plot(steps[-1:], values[-1:], "o", color=colour, markersize=4.5, clip_on=False)
        last = f"{values[-1]:.0f}" if key == "n_active" else f"{values[-1]:.3g}"
        axis.set_title(label, loc="left", fontsize=10, color=INK)
        axis.set_title(last, loc="right", fontsize=10, color=colour, fontweight="bold")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.015, y=0.12)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        plain(axis, grid="y")
    for axis in axes[2:]:
        axis.set_xlabel("step", fontsize=9, color=INK)
    if title:
        figure.suptitle(title, fontsize=10.5, color=INK)
    return written(figure, path)


def _records(result: Learned | Records | str | os.PathLike[str]) -> list[dict[str, float]]:
    if isinstance(result, str | os.PathLike):
        file = Path(result)
        try:
            records, _ = parsed_sealed(read_limited(file, LARGEST), finite=False)
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
    else:
        records = getattr(result, "history", result)
    wanted = {"step", *(key for key, _, _ in _TERMS)}
    if not isinstance(records, Sequence) or not records:
        raise ValueError("history: got no steps, expected the history of a fit")
    if not all(isinstance(record, dict) and wanted <= record.keys() for record in records):
        raise ValueError(f"history: expected a record with {', '.join(sorted(wanted))} for every step")
    return list(records)
