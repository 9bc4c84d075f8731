"""Pictures: where an intervention acts (a signed heat map) and how it was learned (the terms over the steps).

Figures are built without pyplot, so that no global state changes and no display is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .interventions import Intervention
    from .learning import FitResult

_INK, _FAINT, _BLANK, _EDGE = "#22252b", "#8a909c", "#eceef1", "#3b3f47"
_TERMS = (
    ("effectiveness", "effectiveness  E", "#3b6fb6"),
    ("faithfulness", "faithfulness  F", "#c8553d"),
    ("minimality", "minimality  ‖α‖₁", "#5a9367"),
    ("n_active", "active scalars", "#7a5c9e"),
)


def heatmap(
    intervention: Intervention,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    limit: float | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw the scalars of an ActivScalar, layers from left to right: red amplifies, blue suppresses, blank is 0.

    Rows are heads (one panel a position, where there are several) or, at a whole site, positions. Every scalar that is
    not exactly 0 has an outline, so that a small one is told from none.

    Args:
        intervention: an ActivScalar that is not a stack.
        path: where to write the picture, in the format of its suffix (.png, .pdf, .svg); None: nowhere. The file
            appears whole or not at all.
        title: the first line of the title; default "Activation scalars".
        limit: the |α| of full colour; default the largest one.
        dpi: dots an inch of a .png.

    Returns:
        The figure.

    Raises:
        TypeError: not an ActivScalar.
        ValueError: a stack of several, a limit that is not positive, or a suffix that is no format of pictures.

    Example::

        heatmap(intervention, "heads.png")
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from .interventions import ActivScalar

    if not isinstance(intervention, ActivScalar):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an ActivScalar")
    if intervention.n_groups is not None:
        raise ValueError(f"intervention: got a stack of {intervention.n_groups}, expected a single intervention")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: got {limit}, expected a positive number")
    location = intervention.location
    alpha = intervention.alpha.detach().float().cpu().numpy()  # [L, P, H]
    slots = _slot_names(location.positions, location.generated)
    if location.site == "head":
        names = slots if len(slots) > 1 else [None]
        panels = [(name, alpha[:, slot].T) for slot, name in enumerate(names)]  # [H, L] each
        rows, row_label = [str(head) for head in range(alpha.shape[2])], "head"
    else:
        panels, rows, row_label = [(None, alpha[:, :, 0].T)], slots, "position"
    largest = float(abs(alpha).max()) if alpha.size else 0.0
    norm, colours = Normalize(-(limit or largest or 1.0), limit or largest or 1.0), _diverging()

    n_layers, n_rows, n_panels = alpha.shape[0], len(rows), len(panels)
    cell = max(0.07, min(0.3, 9.0 / n_layers, 12.0 / (n_rows * n_panels)))  # all lengths here are inches
    gap, left, right, top, bottom = 0.32, 0.7, 0.95, 0.95 if n_panels > 1 else 0.8, 0.55
    across, down = cell * (n_layers + 0.2), cell * (n_rows + 0.2)
    tall = n_panels * down + (n_panels - 1) * gap
    width, height = max(left + across + right, 4.6), max(tall, 0.9) + top + bottom
    figure = Figure(figsize=(width, height), dpi=dpi)
    for index, (name, values) in enumerate(panels):
        foot = height - top - down - index * (down + gap)
        axis = figure.add_axes((left / width, foot / height, across / width, down / height))
        _cells(axis, values, colours, norm)
        _ticks(axis, [str(layer) for layer in location.layers] if index == n_panels - 1 else None, n_layers, rows)
        axis.set_ylabel(row_label)
        if index == n_panels - 1:
            axis.set_xlabel("layer")
        if name is not None:
            axis.set_title(name if name == "generated" else f"position {name}", loc="left", fontsize=8.5, color=_FAINT)
    long = min(max(tall, 0.9), 3.2)
    place = ((left + across + 0.2) / width, (height - top - long) / height, 0.13 / width, long / height)
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=figure.add_axes(place))
    bar.ax.set_title("α", fontsize=9, color=_INK, pad=5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6 if long > 1.5 else 4, symmetric=True))
    bar.ax.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which matplotlib's annotation hides
    words = {"x": (left + 0.1 * cell) / width, "ha": "left", "va": "top", "color": _INK}
    figure.text(y=1 - 0.16 / height, s=title or "Activation scalars", fontsize=11, fontweight="bold", **words)
    figure.text(y=1 - 0.41 / height, s=_summary(intervention), fontsize=8.5, **words)
    return _written(figure, path)


def history(
    result: FitResult | Sequence[dict[str, float]] | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw the three terms of the objective and the number of active scalars over the steps of a fit.

    Args:
        result: a FitResult, its `.history`, or a JSON file with such a list.
        path: where to write the picture; as in `heatmap`.
        title: above the four panels; default none.
        dpi: dots an inch of a .png.

    Raises:
        ValueError: no steps, a step without one of the terms, or a suffix that is no format of pictures.
        FileNotFoundError: no such file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = _records(result)
    figure = Figure(figsize=(8.4, 4.6), dpi=dpi, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    steps = [record["step"] for record in records]
    for axis, (key, label, colour) in zip(axes, _TERMS, strict=True):
        values = [record[key] for record in records]
        axis.plot(steps, values, color=colour, linewidth=1.8, solid_capstyle="round")
        axis.fill_between(steps, values, color=colour, alpha=0.12, linewidth=0)
        axis.plot(steps[-1:], values[-1:], "o", color=colour, markersize=4.5, clip_on=False)
        last = f"{values[-1]:.0f}" if key == "n_active" else f"{values[-1]:.3g}"
        axis.set_title(label, loc="left", fontsize=10, color=_INK)
        axis.set_title(last, loc="right", fontsize=10, color=colour, fontweight="bold")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.015, y=0.12)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.grid(axis="y", color=_BLANK, linewidth=0.9)
        axis.set_axisbelow(True)
        _plain(axis)
    for axis in axes[2:]:
        axis.set_xlabel("step", fontsize=9, color=_INK)
    if title:
        figure.suptitle(title, fontsize=10.5, color=_INK)
    return _written(figure, path)


def _cells(axis: Axes, values: Any, colours: Any, norm: Any) -> None:
    """values: [rows, layers]; one rounded square each, blank and without outline where the scalar is exactly 0."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import FancyBboxPatch

    def square(row: int, column: int, inset: float) -> FancyBboxPatch:
        corner = 0.12
        side, edge = 1 - 2 * (inset + corner), inset + corner - 0.5
        shape = f"round,pad={corner},rounding_size={corner}"
        return FancyBboxPatch((column + edge, row + edge), side, side, boxstyle=shape)

    n_rows, n_columns = values.shape
    every = [(row, column) for row in range(n_rows) for column in range(n_columns)]
    active = [place for place in every if values[place] != 0]
    axis.add_collection(PatchCollection([square(*p, 0.1) for p in every], facecolor=_BLANK, edgecolor="none"))
    filled = PatchCollection([square(*p, 0.07) for p in active], edgecolor=_EDGE, linewidth=0.5)
    filled.set_facecolor([colours(norm(values[place])) for place in active])
    axis.add_collection(filled)
    axis.set_xlim(-0.6, n_columns - 0.4)
    axis.set_ylim(n_rows - 0.4, -0.6)
    axis.set_aspect("equal")


def _ticks(axis: Axes, columns: list[str] | None, n_columns: int, rows: list[str]) -> None:
    every = 1 + (n_columns - 1) // 24
    axis.set_xticks(range(0, n_columns, every), columns[::every] if columns else [""] * len(range(0, n_columns, every)))
    every = 1 + (len(rows) - 1) // 16
    axis.set_yticks(range(0, len(rows), every), rows[::every])
    _plain(axis)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_FAINT)
    axis.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK)
    axis.xaxis.label.set(color=_INK, fontsize=9)
    axis.yaxis.label.set(color=_INK, fontsize=9)


def _diverging() -> Any:
    """Blue through near-white to red, of equal lightness on both sides."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "actscale", ["#1b3f7a", "#3f7cbf", "#9cc3e4", "#fbfbfb", "#f3ad94", "#d2553f", "#7f1a26"]
    )


def _slot_names(positions: tuple[int, ...] | None, generated: bool) -> list[str]:
    if positions is None:
        return ["all"]
    return [str(position) for position in positions] + ["generated"] * generated


def _summary(intervention: Intervention) -> str:
    where = {"head": "attention heads", "attn_out": "attention outputs", "mlp_out": "MLP outputs"}
    place = where.get(intervention.location.site, "residual stream")
    return f"{intervention.n_active} of {intervention.n_parameters} active  ·  ‖α‖₁ = {intervention.l1:.2f}  ·  {place}"


def _records(result: FitResult | Sequence[dict[str, float]] | str | os.PathLike[str]) -> list[dict[str, float]]:
    if isinstance(result, str | os.PathLike):
        file = Path(result)
        try:
            records = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
    else:
        records = getattr(result, "history", result)
    wanted = {"step", *(key for key, _, _ in _TERMS)}
    if not isinstance(records, Sequence) or not records:
        raise ValueError("history: got no steps, expected the history of a fit")
    if not all(isinstance(record, dict) and wanted <= record.keys() for record in records):
        raise ValueError(f"history: expected a record with {', '.join(sorted(wanted))} for every step")
    return list(records)


def _written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"path: got {os.fspath(path)!r}, expected a file that ends in .png, .pdf or .svg")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix)
    return figure
