"""Figures that show themselves in a notebook, whether or not pyplot was imported there."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Pixels per inch of a figure's size on a page; the image itself has the figure's own resolution.
_PAGE = 96


class NotebookFigure(Figure):
    """A Figure that IPython displays as a PNG.

    A plain Figure that pyplot does not know is displayed only after `import matplotlib.pyplot`; one that pyplot knows
    would be displayed twice.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        image = io.BytesIO()
        self.savefig(image, format="png")
        width, height = self.get_size_inches()
        return image.getvalue(), {"width": round(width * _PAGE), "height": round(height * _PAGE)}


def one_axis(ax: Axes | None, **options: Any) -> tuple[Figure, Axes]:
    """The figure and the axes to draw in: those of the caller, or new ones with these options of a Figure.

    Raises:
        TypeError: `ax` is not a matplotlib Axes.
    """
    from matplotlib.axes import Axes

    if ax is None:
        figure = NotebookFigure(**options, layout="constrained")
        return figure, figure.subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: got {type(ax).__name__}, expected a matplotlib Axes")
    found = ax.get_figure(root=True)
    assert found is not None
    return found, ax
