"""Small matrices with their numbers: how much two sets of active scalars have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import FAINT, INK, two_lines, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overlap(
    matrix: Any,
    labels: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    quantity: str = "shared of both (Jaccard)",
    dpi: int = 160,
) -> Figure:
    """Draw how much each two sets have in common, as a number between 0 and 1 in each cell.

    Args:
        matrix: [N, N] symmetric, as a tensor, an array or nested lists; NaN where there is nothing to compare.
        labels: the names of the N sets.
        path, dpi: as in `heatmap`.
        title: the first line; default "Overlap of active scalars".
        quantity: what the numbers are.

    Raises:
        ValueError: not a square matrix of numbers between 0 and 1, more or fewer labels than rows, or a suffix that is
            not a picture format.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    from .figures import NotebookFigure

    values = np.asarray(matrix, dtype=float)
    n = len(labels)
    if values.shape != (n, n) or not n:
        raise ValueError(f"matrix: got shape {values.shape} for {n} labels, expected ({n}, {n})")
    if ((values < 0) | (values > 1)).any():
        raise ValueError("matrix: got values outside 0 to 1, expected shares")
    colours = LinearSegmentedColormap.from_list("shares", ["#f4f6f9", "#9cc3e4", "#3f7cbf", "#1b3f7a"])
    cell, long = 0.46, 0.06 * max(map(len, labels))  # inches
    left, top, bottom = long + 0.25, 0.72, (long if long > cell else 0.16) + 0.18
    width, height = max(left + cell * n + 0.2, 0.09 * len(title or "") + 0.3, 3.0), top + cell * n + bottom
    figure = NotebookFigure(figsize=(width, height), dpi=dpi)
    axis = figure.add_axes((left / width, bottom / height, cell * n / width, cell * n / height))
    for row in range(n):
        for column in range(n):
            value = values[row, column]
            known = not np.isnan(value)
            colour = colours(value) if known else "white"
            axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=colour, edgecolor="none"))
            ink = FAINT if not known else "white" if value > 0.5 else INK
            number = f"{value:.2f}" if known else "–"
            axis.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)
    axis.set_xlim(-0.5, n - 0.5)
    axis.set_ylim(n - 0.5, -0.5)
    axis.set_xticks(range(n), labels, rotation=90 if long > cell else 0)
    axis.set_yticks(range(n), labels)
    axis.tick_params(labelsize=8, length=0, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
    two_lines(figure, title or "Overlap of active scalars", quantity, left=0.12, top=0.12)
    return written(figure, path)
