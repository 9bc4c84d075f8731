"""What all pictures share: one style, axes without a frame, headings, colour bars and atomic files."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

INK, PALE, FAINT, BLANK, EDGE, HAIR = "#22252b", "#e8eaee", "#767c88", "#eceef1", "#3b3f47", "#d5d8de"
#: Figures made by the package are opaque, so that they read on a dark page and under a dark style of matplotlib.
PAPER = "white"
#: Font sizes in points; pages show pictures at about half their size.
TICKS, NAMES, WORDS, HEADING = 9.0, 10.0, 9.5, 12.0

#: Colours and marks of curves: the colours of Okabe and Ito (2008), which are told apart with any colour vision.
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
FROZEN = "frozen model"
DASHES = (0, (4, 3))


def series(number: int) -> tuple[str, str]:
    """The colour and the mark of a curve; colours repeat after six, pairs of both after 36."""
    n = len(SERIES)
    return SERIES[number % n][0], SERIES[(number + number // n) % n][1]


def diverging() -> Colormap:
    """Blue through near-white to red, for signed values."""
    from matplotlib import colormaps

    return colormaps["RdBu_r"]


def ink(axis: Axes) -> str:
    """The colour of words beside an axis: dark, or pale on the dark figure of a caller."""
    from matplotlib.colors import to_rgba

    figure = axis.get_figure(root=True)
    red, green, blue, alpha = to_rgba(figure.get_facecolor() if figure is not None else PAPER)
    return PALE if alpha > 0.5 and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK


def plain(axis: Axes, grid: str = "") -> None:
    """Keep only the axes that carry numbers, in quiet colours, over grid lines along the axes named in `grid`."""
    axis.grid(False)
    for name in grid:
        axis.grid(axis=name, color=FAINT, alpha=0.22, linewidth=0.8 if name == "y" else 0.6)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    words = ink(axis)
    axis.tick_params(which="both", labelsize=TICKS, color=FAINT, labelcolor=words)
    axis.xaxis.label.set(color=words, fontsize=NAMES)
    axis.yaxis.label.set(color=words, fontsize=NAMES)


def panel_title(axis: Axes, title: str, *, colour: str | None = None, **options: Any) -> None:
    """Put the name of a panel above its axes, on the left unless `loc` says otherwise."""
    options.setdefault("loc", "left")
    axis.set_title(title, fontsize=WORDS, color=colour or ink(axis), **options)


def headed(
    axes: Sequence[Axes],
    title: str | None,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
    *,
    own: bool,
    beneath: bool = False,
) -> None:
    """Put a title and a legend, where given, above all panels of an own figure, else into the caller's first axes.

    With `beneath`, the legend is below the caller's axes, which have no room for it.
    """
    axis, words = axes[0], ink(axes[0])
    bold: dict[str, Any] = {"fontsize": HEADING, "fontweight": "bold", "color": words}
    options: dict[str, Any] = {"frameon": False, "fontsize": WORDS, "labelcolor": words}
    figure = axis.get_figure(root=True)
    assert figure is not None
    if title:
        title = wrapped(title, float((figure if own else axis).get_window_extent().width) / figure.dpi)
    if not own:
        if title:
            there = axis.get_title(loc="left")
            axis.set_title(f"{title}\n{there}" if there else title, loc="left", **bold)
        if labels:
            options |= {"frameon": True, "facecolor": axis.get_facecolor(), "edgecolor": "none"}
            options |= {"loc": "upper left", "bbox_to_anchor": (0.0, -0.12), "ncols": 3} if beneath else {}
            axis.legend(handles, labels, **options)
    elif labels:
        legend = figure.legend(
            handles, labels, loc="outside upper left", ncols=min(len(labels), 4), columnspacing=1.6, title=title,
            alignment="left", title_fontproperties={"weight": "bold", "size": HEADING}, **options,
        )  # fmt: skip
        legend.get_title().set_color(words)
    elif title:
        figure.suptitle(title, x=0.012, ha="left", **bold)


def wrapped(title: str, width: float) -> str:
    """A bold title in lines that fit into a width in inches."""
    return textwrap.fill(title, max(int(width / 0.1), 16))  # a character takes about 0.1


def two_lines(figure: Figure, title: str, summary: str, *, left: float, top: float) -> None:
    """Write a bold line and a smaller one at the top of a figure; `left` and `top` are inches from its corner."""
    width, height = figure.get_size_inches()
    words: dict[str, Any] = {"x": left / width, "ha": "left", "va": "top", "color": INK}
    figure.text(y=1 - top / height, s=title, fontsize=HEADING, fontweight="bold", **words)
    figure.text(y=1 - (top + 0.27) / height, s=summary, fontsize=WORDS, **words)


def two_lines_above(axis: Axes, title: str, summary: str) -> None:
    """The same above the axes of a caller and the title that they have; a long summary takes two lines."""
    box = axis.get_window_extent()
    figure = axis.get_figure(root=True)
    assert figure is not None
    if 0.07 * len(summary) > box.width / figure.dpi:  # inches; a character takes 0.07
        summary = summary.replace("  ·  ", "\n", 1)
    one = 1.3 * WORDS  # points that a line takes
    foot = 4 + 1.2 * one * bool(axis.get_title(loc="left"))
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    above |= {"annotation_clip": False, "color": ink(axis)}
    axis.annotate(summary, (0, 1), (0, foot), **above, fontsize=WORDS)
    top = foot + one * (1 + summary.count("\n"))
    axis.annotate(title, (0, 1), (0, top), **above, fontsize=HEADING, fontweight="bold")


def colour_bar(figure: Figure, norm: Normalize, colours: Colormap, **place: Any) -> Any:
    """A colour bar without an outline, placed as `Figure.colorbar` is told."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), **place)
    bar.ax.tick_params(which="both", labelsize=TICKS, color=FAINT, labelcolor=ink(bar.ax))
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which matplotlib's annotation hides
    return bar


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure in the format of the path's suffix, if there is a path, and return it."""
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that ends in .png, .pdf or .svg")
        with atomic_path(path) as temporary:
            # Whatever matplotlib's settings say: a picture without background is unreadable on some pages.
            figure.savefig(temporary, format=suffix, facecolor=figure.get_facecolor(), transparent=False)
    return figure
