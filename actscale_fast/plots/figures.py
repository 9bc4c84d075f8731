"""Figures that show themselves in a notebook, whether or not pyplot was imported there, and the axes of a caller."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .drawing import PAPER

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Pixels per inch of a figure's size on a page; the image itself has the figure's own resolution.
_PAGE = 96


class NotebookFigure(Figure):
    """A Figure that IPython displays as a PNG.

    A plain Figure that pyplot does not know is displayed only after `import matplotlib.pyplot`; one that pyplot knows
    would be displayed twice.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"facecolor": PAPER} | options)

    def add_subplot(self, *arguments: Any, **options: Any) -> Axes:
        return super().add_subplot(*arguments, **{"facecolor": PAPER} | options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        image = io.BytesIO()
        self.savefig(image, format="png", facecolor=self.get_facecolor(), transparent=False)
        width, height = self.get_size_inches()
        return image.getvalue(), {"width": round(width * _PAGE), "height": round(height * _PAGE)}


def axes_of(given: Axes | Sequence[Axes], number: int, panels: str = "panel") -> tuple[Figure, list[Axes]]:
    """The axes of a caller, one for each panel, and their figure.

    Raises:
        TypeError: something that is not a matplotlib Axes.
        ValueError: more or fewer of them than panels.
    """
    axes = list(_flat(given))
    if not axes or not all(isinstance(axis, Axes) for axis in axes):
        raise TypeError(
            f"ax: got {type(given).__name__}, expected a matplotlib Axes"
            + (f" for each of the {number} {panels}s" if number > 1 else "")
        )
    if len(axes) != number:
        raise ValueError(f"ax: got {len(axes)} Axes, expected {number}, one for each {panels}")
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    return figure, axes


def panels(
    ax: Axes | Sequence[Axes] | None,
    rows: int,
    columns: int,
    *,
    name: str = "panel",
    share: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """The figure and the axes to draw in: those of the caller, or new ones with these options of a Figure."""
    if ax is not None:
        return axes_of(ax, rows * columns, name)
    # Inches: words keep clear of the edge, which shows on a dark page.
    figure = NotebookFigure(**options, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **share or {}).ravel())


def _flat(given: Any) -> Iterator[Any]:
    """The axes in nested sequences or an array of them, row by row."""
    if isinstance(given, Axes) or not hasattr(given, "__iter__") or isinstance(given, str):
        yield given
    else:
        for one in given:
            yield from _flat(one)
