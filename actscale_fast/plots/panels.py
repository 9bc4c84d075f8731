"""Signed maps of cells: panels in one or several columns, layers from left to right, a colour bar per quantity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .drawing import BLANK, EDGE, FAINT, HAIR, INK, colour_bar, plain, two_lines

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
    outlined: Any = None  # bool [rows, layers]; None: all cells that are not exactly 0


def panels_figure(
    panels: Sequence[Panel],
    *,
    layers: Sequence[int],
    rows: Sequence[str],
    row_label: str,
    title: str,
    summary: str,
    limit: float | None,
    dpi: int,
    columns: int = 1,
    every_row: bool = False,
) -> Figure:
    """Draw maps of the same rows and layers; red is above 0, blue is below, blank is exactly 0.

    Args:
        panels: from top to bottom; with several columns row by row, and all of one quantity.
        layers, rows: the names of the columns and rows; `row_label` names the rows' axis.
        title, summary: the two lines above, the first in bold.
        limit: the magnitude shown in full colour; None: the largest one of each quantity.
        dpi: dots per inch.
        columns: panels side by side.
        every_row: label all rows, in cells that leave room for it.
    """
    from .figures import NotebookFigure

    n_layers, n_rows, n_panels = len(layers), len(rows), len(panels) // columns
    # All lengths here are inches.
    cell = max(0.15 if every_row else 0.07, min(0.3, 9.0 / (n_layers * columns), 12.0 / (n_rows * n_panels)))
    gap, right, top, bottom = 0.32, 0.95, 0.95 if panels[0].title else 0.8, 0.55
    left = max(0.7, 0.45 + 0.065 * max(map(len, rows)))
    one, down = cell * (n_layers + 0.2), cell * (n_rows + 0.2)
    across = columns * one + (columns - 1) * _BETWEEN
    tall = n_panels * down + (n_panels - 1) * gap
    # A character takes 0.065, and 0.09 in the bold line.
    beside = left + max(across, *(0.065 * len(panel.title or "") for panel in panels)) + 0.2
    width = max(beside + right - 0.2, left + 0.065 * len(summary) + 0.1, left + 0.09 * len(title) + 0.1, 4.6)
    height = max(tall, 0.9) + top + bottom
    figure = NotebookFigure(figsize=(width, height), dpi=dpi)
    index = 0  # of the row of panels
    for quantity, group in itertools.groupby(panels, key=lambda panel: panel.quantity):
        alike = list(group)
        largest = limit or max(float(abs(panel.values).max(initial=0.0)) for panel in alike) or 1.0
        above = top + index * (down + gap)
        for number, panel in enumerate(alike):
            foot = height - top - down - index * (down + gap)
            column = number % columns
            start = left + column * (one + _BETWEEN)
            axis = figure.add_axes((start / width, foot / height, one / width, down / height))
            _cells(axis, panel, largest)
            last = index == n_panels - 1
            shown = 1 if every_row else 1 + (n_rows - 1) // 16
            _ticks(axis, [str(layer) for layer in layers] if last else None, n_layers, rows, shown, one)
            if column == 0:
                axis.set_ylabel(row_label)
            else:
                axis.set_yticklabels([])
            if last:
                axis.set_xlabel("layer")
            if panel.title:
                axis.set_title(panel.title, loc="left", fontsize=8.5, color=FAINT)
            index += column == columns - 1
        spread = len(alike) // columns
        long = min(max(spread * (down + gap) - gap, 0.9 if spread == n_panels else down), 3.2)
        place = (beside / width, (height - above - long) / height, 0.13 / width, long / height)
        _bar(figure, place, quantity, largest, 6 if long > 1.5 else 4)
    two_lines(figure, title, summary, left=left + 0.1 * cell, top=0.14)
    return figure


def _bar(figure: Figure, place: tuple[float, float, float, float], quantity: str, limit: float, n_ticks: int) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    bar = colour_bar(figure, Normalize(-limit, limit), _diverging(), cax=figure.add_axes(place))
    bar.ax.set_title(quantity, fontsize=9, color=INK, pad=5)
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
    colours, norm = _diverging(), Normalize(-limit, limit)
    every = [(row, column) for row in range(n_rows) for column in range(n_columns)]
    active = [place for place in every if values[place] != 0]
    axis.add_collection(PatchCollection([square(*p, 0.1) for p in every], facecolor=BLANK, edgecolor="none"))
    filled = PatchCollection([square(*p, 0.07) for p in active])
    filled.set_facecolor([colours(norm(values[place])) for place in active])
    width = 0.5 if panel.outlined is None else 1.1
    filled.set_edgecolor([EDGE if outlined[place] else HAIR for place in active])
    filled.set_linewidth([width if outlined[place] else 0.4 for place in active])
    axis.add_collection(filled)
    axis.set_xlim(-0.6, n_columns - 0.4)
    axis.set_ylim(n_rows - 0.4, -0.6)
    axis.set_aspect("equal")


def _ticks(
    axis: Axes, columns: list[str] | None, n_columns: int, rows: Sequence[str], every_row: int, width: float
) -> None:
    every = 1 + (n_columns - 1) // max(min(24, int(width / 0.2)), 1)
    axis.set_xticks(range(0, n_columns, every), columns[::every] if columns else [""] * len(range(0, n_columns, every)))
    axis.set_yticks(range(0, len(rows), every_row), rows[::every_row])
    plain(axis)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)


def _diverging() -> Any:
    """Blue through near-white to red, of equal lightness on both sides."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "actscale", ["#1b3f7a", "#3f7cbf", "#9cc3e4", "#fbfbfb", "#f3ad94", "#d2553f", "#7f1a26"]
    )
