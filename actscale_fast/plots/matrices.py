"""Small matrices with their numbers: how much two sets of active scalars have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import FAINT, INK, PAPER, TICKS, ink, two_lines, two_lines_above, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overlap(
    matrix: Any,
    labels: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    quantity: str = "shared of both (Jaccard)",
    dpi: int = 160,
    ax: Axes | None = None,
) -> Figure:
    """Draw how much each two sets have in common, as a number between 0 and 1 in each cell.

    Args:
        matrix: [N, N] symmetric, as a tensor, an array or nested lists; NaN where there is nothing to compare.
        labels: the names of the N sets.
        path, dpi: as in `heatmap`.
        title: the first line; default "Overlap of active scalars".
        quantity: what the numbers are.
        ax: draw into these axes instead of a new figure; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: `ax` is not a matplotlib Axes.
        ValueError: not a square matrix of numbers between 0 and 1, more or fewer labels than rows, or a suffix that is
            not a picture format.
    """
    from .figures import NotebookFigure, axes_of

    values = np.asarray(matrix, dtype=float)
    n = len(labels)
    if values.shape != (n, n) or not n:
        raise ValueError(f"matrix: got shape {values.shape} for {n} labels, expected ({n}, {n})")
    if ((values < 0) | (values > 1)).any():
        raise ValueError("matrix: got values outside 0 to 1, expected shares")
    heading = title or "Overlap of active scalars"
    cell, long = 0.5, 0.067 * max(map(len, labels))  # inches
    if ax is None:
        left, top, bottom = long + 0.25, 0.78, (long if long > cell else 0.16) + 0.18
        width, height = max(left + cell * n + 0.2, 0.1 * len(heading) + 0.3, 3.0), top + cell * n + bottom
        figure: Figure = NotebookFigure(figsize=(width, height), dpi=dpi)
        axis = figure.add_axes((left / width, bottom / height, cell * n / width, cell * n / height), facecolor=PAPER)
        two_lines(figure, heading, quantity, left=0.12, top=0.12)
    else:
        figure, (axis,) = axes_of(ax, 1)
        two_lines_above(axis, heading, quantity)
    _cells(axis, values)
    axis.grid(False)
    axis.set_aspect("equal")
    axis.set_xlim(-0.5, n - 0.5)
    axis.set_ylim(n - 0.5, -0.5)
    axis.set_xticks(range(n), labels, rotation=90 if long > cell else 0)
    axis.set_yticks(range(n), labels)
    axis.tick_params(labelsize=TICKS, length=0, labelcolor=ink(axis))
    for spine in axis.spines.values():
        spine.set_visible(False)
    return written(figure, path)


def _cells(axis: Axes, values: Any) -> None:
    """One square with its number for each value; more is darker."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["Blues"]
    for (row, column), value in np.ndenumerate(values):
        known = not np.isnan(value)
        colour = colours(0.05 + 0.9 * value) if known else PAPER
        axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=colour, edgecolor="none"))
        letters = FAINT if not known else "white" if value > 0.6 else INK
        number = f"{value:.2f}" if known else "–"
        axis.text(column, row, number, ha="center", va="center", fontsize=TICKS, color=letters)
