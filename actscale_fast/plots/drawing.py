"""What all pictures share: colours, axes without a frame, files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLANK, EDGE, HAIR = "#22252b", "#8a909c", "#eceef1", "#3b3f47", "#d5d8de"

#: Colours and marks of several curves: their lightness differs too, so that they are told apart in grey.
SERIES = (("#1b3f7a", "o"), ("#d2553f", "s"), ("#7fb069", "^"), ("#8e6bb0", "D"), ("#e3b23c", "v"), ("#5b6270", "P"))


def series(number: int) -> tuple[str, str]:
    """Colour and mark of the curve of this number; they repeat after six."""
    return SERIES[number % len(SERIES)]


def plain(axis: Axes) -> None:
    """Only the axes that carry numbers, in quiet colours."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axis.xaxis.label.set(color=INK, fontsize=9)
    axis.yaxis.label.set(color=INK, fontsize=9)


def headed(figure: Figure, title: str | None, handles: Sequence[Any] = (), labels: Sequence[str] = ()) -> None:
    """A title and one line of names above all panels of a constrained figure, each where there is one."""
    if labels:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=min(len(labels), 4), frameon=False, fontsize=8.5,
            labelcolor=INK, columnspacing=1.6, title=title, alignment="left",
            title_fontproperties={"weight": "bold", "size": 10.5},
        )  # fmt: skip
    elif title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=INK)


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, also in a file of the suffix's format where there is a path."""
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that ends in .png, .pdf or .svg")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix)
    return figure
