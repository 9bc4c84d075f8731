"""Signed maps of cells: panels in one or several columns, layers from left to right, a colour bar per quantity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import drawing
from .drawing import FAINT, colour_bar, diverging, ink, panel_title, plain, two_lines, two_lines_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BETWEEN = 0.25  # inches between two columns


@dataclass(frozen=True, slots=True)
class Panel:
    """One map."""

    values: Any  # numpy [rows, layers]
    quantity: str  # what the colours mean; panels of one quantity stand together and share a scale
    title: str | None = None
    outlined: Any = None  # bool [rows, layers]; None: all cells that are not exactly 0, those in `faint` in grey
    faint: Any = None  # bool [rows, layers]: cells too small to be seen


@dataclass(frozen=True, slots=True)
class Names:
    """What the columns and rows of all maps of a picture are called."""

    layers: Sequence[int]
    rows: Sequence[str]
    row_label: str
    every_row: bool = False  # label all rows, in cells that leave room for it


def panels_figure(
    panels: Sequence[Panel],
    names: Names,
    *,
    title: str,
    summary: str,
    limit: float | None,
    dpi: int,
    columns: int = 1,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw maps of the same rows and layers; red is above 0, blue is below, blank is exactly 0.

    Args:
        panels: from top to bottom; with several columns row by row, and all of one quantity.
        names: of the rows and layers.
        title, summary: the two lines above, the first in bold.
        limit: the magnitude shown in full colour; None: the largest one of each quantity.
        dpi: dots per inch.
        columns: panels side by side.
        ax: draw into these axes, one for each panel, instead of a new figure.
    """
    from .figures import NotebookFigure, axes_of

    if ax is not None:
        figure, given = axes_of(ax, len(panels), "map")
        for axis, panel in zip(given, panels, strict=True):
            largest = limit or _largest([one for one in panels if one.quantity == panel.quantity])
            _map(axis, panel, largest, names, width=axis.get_window_extent().width / figure.dpi)
            axis.set_facecolor(drawing.PAPER)  # the colours are made for it
            _bar(figure, panel.quantity, largest, 4, cax=axis.inset_axes((1.02, 0, 0.02, 1)))
        two_lines_above(given[0], title, summary)
        return figure
    n_layers, n_rows, n_panels = len(names.layers), len(names.rows), len(panels) // columns
    # All lengths here are inches.
    cell = max(0.17 if names.every_row else 0.07, min(0.3, 9.0 / (n_layers * columns), 12.0 / (n_rows * n_panels)))
    gap, right, top, bottom = 0.36, 1.05, 1.02 if panels[0].title else 0.86, 0.6
    left = max(0.75, 0.5 + 0.075 * max(map(len, names.rows)))
    one, down = cell * (n_layers + 0.2), cell * (n_rows + 0.2)
    across = columns * one + (columns - 1) * _BETWEEN
    tall = n_panels * down + (n_panels - 1) * gap
    # A character takes 0.075, and 0.1 in the bold line.
    beside = left + max(across, *(0.075 * len(panel.title or "") for panel in panels)) + 0.2
    width = max(beside + right - 0.2, left + 0.075 * len(summary) + 0.1, left + 0.1 * len(title) + 0.1, 4.6)
    height = max(tall, 0.9) + top + bottom
    figure = NotebookFigure(figsize=(width, height), dpi=dpi)
    index = 0  # of the row of panels
    for quantity, group in itertools.groupby(panels, key=lambda panel: panel.quantity):
        alike = list(group)
        largest = limit or _largest(alike)
        above = top + index * (down + gap)
        for number, panel in enumerate(alike):
            foot = height - top - down - index * (down + gap)
            column = number % columns
            start = left + column * (one + _BETWEEN)
            place = (start / width, foot / height, one / width, down / height)
            axis = figure.add_axes(place, facecolor=drawing.PAPER)
            _map(axis, panel, largest, names, width=one, first=column == 0, last=index == n_panels - 1)
            index += column == columns - 1
        spread = len(alike) // columns
        long = min(max(spread * (down + gap) - gap, 0.9 if spread == n_panels else down), 3.2)
        place = (beside / width, (height - above - long) / height, 0.13 / width, long / height)
        _bar(figure, quantity, largest, 6 if long > 1.5 else 4, cax=figure.add_axes(place))
    two_lines(figure, title, summary, left=left + 0.1 * cell, top=0.14)
    return figure


def _largest(panels: Sequence[Panel]) -> float:
    return max(float(abs(panel.values).max(initial=0.0)) for panel in panels) or 1.0


def _map(
    axis: Axes, panel: Panel, limit: float, names: Names, *, width: float, first: bool = True, last: bool = True
) -> None:
    """One map; `first` names the rows on its left, `last` the layers below it. `width` is in inches."""
    _cells(axis, panel, limit)
    n_layers, every_row = len(names.layers), 1 if names.every_row else 1 + (len(names.rows) - 1) // 16
    every = 1 + (n_layers - 1) // max(min(24, int(width / 0.22)), 1)
    axis.set_xticks(range(0, n_layers, every), [str(layer) if last else "" for layer in names.layers[::every]])
    axis.set_yticks(range(0, len(names.rows), every_row), [name if first else "" for name in names.rows[::every_row]])
    axis.set_ylabel(names.row_label if first else "")
    axis.set_xlabel("layer" if last else "")
    plain(axis)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    if panel.title:
        panel_title(axis, panel.title, colour=FAINT)


def _bar(figure: Figure, quantity: str, limit: float, n_ticks: int, **place: Any) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    bar = colour_bar(figure, Normalize(-limit, limit), diverging(), **place)
    bar.ax.set_title(quantity, fontsize=drawing.NAMES, color=ink(bar.ax), pad=5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(n_ticks, symmetric=True))
    bar.ax.tick_params(length=2)


def _cells(axis: Axes, panel: Panel, limit: float) -> None:
    """One rounded square for each value, blank and without outline where it is exactly 0."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import FancyBboxPatch

    def square(row: int, column: int, inset: float) -> FancyBboxPatch:
        corner = 0.12
        side, edge = 1 - 2 * (inset + corner), inset + corner - 0.5
        shape = f"round,pad={corner},rounding_size={corner}"
        return FancyBboxPatch((column + edge, row + edge), side, side, boxstyle=shape)

    values, outlined = panel.values, panel.values != 0 if panel.outlined is None else panel.outlined
    n_rows, n_columns = values.shape
    colours, norm = diverging(), Normalize(-limit, limit)
    faint = np.zeros_like(outlined) if panel.faint is None else panel.faint
    every = [(row, column) for row in range(n_rows) for column in range(n_columns)]
    active = [place for place in every if values[place] != 0]
    axis.add_collection(PatchCollection([square(*p, 0.1) for p in every], facecolor=drawing.BLANK, edgecolor="none"))
    filled = PatchCollection([square(*p, 0.07) for p in active])
    filled.set_facecolor([colours(norm(values[place])) for place in active])
    width = 0.5 if panel.outlined is None else 1.1
    filled.set_edgecolor(
        [(FAINT if faint[place] else drawing.EDGE) if outlined[place] else drawing.HAIR for place in active]
    )
    filled.set_linewidth([0.4 if not outlined[place] else 0.9 if faint[place] else width for place in active])
    filled.set_linestyle([":" if faint[place] else "-" for place in active])
    axis.add_collection(filled)
    axis.set_xlim(-0.6, n_columns - 0.4)
    axis.set_ylim(n_rows - 0.4, -0.6)
    axis.set_aspect("equal")
