"""What all pictures share: colours, axes without a frame, files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLANK, EDGE, HAIR = "#22252b", "#8a909c", "#eceef1", "#3b3f47", "#d5d8de"


def plain(axis: Axes) -> None:
    """Only the axes that carry numbers, in quiet colours."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axis.xaxis.label.set(color=INK, fontsize=9)
    axis.yaxis.label.set(color=INK, fontsize=9)


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, also in a file of the suffix's format where there is a path."""
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that ends in .png, .pdf or .svg")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix)
    return figure
