"""What all pictures share: colours, axes without a frame, colour bars and atomic files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

INK, FAINT, BLANK, EDGE, HAIR = "#22252b", "#8a909c", "#eceef1", "#3b3f47", "#d5d8de"

#: Colours and marks of curves. Their lightness differs too, so that they can be told apart in greyscale.
SERIES = (("#1b3f7a", "o"), ("#d2553f", "s"), ("#7fb069", "^"), ("#8e6bb0", "D"), ("#e3b23c", "v"), ("#5b6270", "P"))


def series(number: int) -> tuple[str, str]:
    """The colour and the mark of a curve; they repeat after six."""
    return SERIES[number % len(SERIES)]


def plain(axis: Axes, grid: str = "") -> None:
    """Keep only the axes that carry numbers, in quiet colours, over grid lines along the axes named in `grid`."""
    for name in grid:
        axis.grid(axis=name, color=BLANK, linewidth=0.9 if name == "y" else 0.6)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axis.xaxis.label.set(color=INK, fontsize=9)
    axis.yaxis.label.set(color=INK, fontsize=9)


def headed(figure: Figure, title: str | None, handles: Sequence[Any] = (), labels: Sequence[str] = ()) -> None:
    """Put a title and a line of names, where given, above all panels of a figure with constrained layout."""
    if labels:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=min(len(labels), 4), frameon=False, fontsize=8.5,
            labelcolor=INK, columnspacing=1.6, title=title, alignment="left",
            title_fontproperties={"weight": "bold", "size": 10.5},
        )  # fmt: skip
    elif title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=INK)


def headed_axis(axis: Axes, title: str | None, handles: Sequence[Any] = (), labels: Sequence[str] = ()) -> None:
    """Put a title above one axis and the names into it, where given: the axes of a caller share their figure."""
    if title:
        axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    if labels:
        axis.legend(handles, labels, frameon=False, fontsize=8.5, labelcolor=INK)


def two_lines(figure: Figure, title: str, summary: str, *, left: float, top: float) -> None:
    """Write a bold line and a smaller one at the top of a figure; `left` and `top` are inches from its corner."""
    width, height = figure.get_size_inches()
    words: dict[str, Any] = {"x": left / width, "ha": "left", "va": "top", "color": INK}
    figure.text(y=1 - top / height, s=title, fontsize=11, fontweight="bold", **words)
    figure.text(y=1 - (top + 0.26) / height, s=summary, fontsize=8.5, **words)


def colour_bar(figure: Figure, norm: Normalize, colours: Colormap, **place: Any) -> Any:
    """A colour bar without an outline, placed as `Figure.colorbar` is told."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), **place)
    bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which matplotlib's annotation hides
    return bar


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure in the format of the path's suffix, if there is a path, and return it."""
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that ends in .png, .pdf or .svg")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix)
    return figure
