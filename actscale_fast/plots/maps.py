"""Maps of heads (or positions) by layers: an intervention's scalars, and what an attribution found."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .drawing import written
from .panels import Panel, panels_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..interventions import Intervention, Location
    from ..learning import Attribution

_PLACES = {
    "head": "attention heads",
    "attn_out": "attention outputs",
    "mlp_out": "MLP outputs",
    "residual": "residual stream",
}


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
    from ..interventions import ActivScalar

    if not isinstance(intervention, ActivScalar):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an ActivScalar")
    if intervention.n_groups is not None:
        raise ValueError(f"intervention: got a stack of {intervention.n_groups}, expected a single intervention")
    location = intervention.location
    figure = panels_figure(
        [Panel(values, "α", name) for name, values in _maps(intervention.alpha.detach(), location)],
        **_axes_of(location),
        title=title or "Activation scalars",
        summary=f"{intervention.n_active} of {intervention.n_parameters} active  ·  ‖α‖₁ = {intervention.l1:.2f}  ·  "
        f"{_PLACES[location.site]}",
        limit=_checked(limit),
        dpi=dpi,
    )
    return written(figure, path)


def attribution(
    result: Attribution,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    limit: float | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw what removing each head is predicted to change, −score, above what it was measured to change.

    Both are changes of the mean logit difference z[c] − z[w] in one colour scale: a blue head speaks for the correct
    answer, since the difference falls without it, a red one against it. Scores of an objective are another quantity and
    have a scale of their own. Outlines mark the largest of each map.

    Args:
        result: of `attribution`; without knock-outs there is the prediction alone.
        path, dpi: as in `heatmap`.
        title: the first line of the title; default "Removing one head at a time".
        limit: the magnitude of full colour; default the largest one.

    Returns:
        The figure.

    Raises:
        TypeError: not an Attribution.
        ValueError: a limit that is not positive, or a suffix that is no format of pictures.
    """
    import torch

    from ..learning import Attribution

    if not isinstance(result, Attribution):
        raise TypeError(f"result: got {type(result).__name__}, expected an Attribution")
    location = result.location
    change = "Δ logits"
    predicted = ("predicted: the gradient at α = 0", change if result.objective is None else "Δ objective")
    panels = []
    for tensor, (label, quantity) in ((-result.scores, predicted), (result.knock_out, ("measured", change))):
        if tensor is not None:
            largest = torch.zeros(tensor.numel(), dtype=torch.bool)
            largest[tensor.flatten().abs().topk(result.n_top).indices] = True
            marks = _maps(largest.view(tensor.shape), location)
            for (name, values), (_, marked) in zip(_maps(tensor, location), marks, strict=True):
                panels.append(Panel(values, quantity, f"{label}  ·  {name}" if name else label, marked > 0))
    thing = "head" if location.site == "head" else "layer's " + _PLACES[location.site].removesuffix("s")
    figure = panels_figure(
        panels,
        **_axes_of(location),
        title=title or f"Removing one {thing} at a time",
        summary=_agreement(result),
        limit=_checked(limit),
        dpi=dpi,
    )
    return written(figure, path)


def _maps(values: Any, location: Location) -> list[tuple[str | None, Any]]:
    """A tensor [L, P, H] as named maps, numpy [rows, layers] each."""
    array = values.float().cpu().numpy()
    if location.site != "head":
        return [(None, array[:, :, 0].T)]
    slots = _slot_names(location)
    names = [name if name == "generated" else f"position {name}" for name in slots] if len(slots) > 1 else [None]
    return [(name, array[:, slot].T) for slot, name in enumerate(names)]


def _axes_of(location: Location) -> dict[str, Any]:
    if location.site == "head":
        rows, row_label = [str(head) for head in range(location.n_heads)], "head"
    else:
        rows, row_label = _slot_names(location), "position"
    return {"layers": location.layers, "rows": rows, "row_label": row_label}


def _slot_names(location: Location) -> list[str]:
    if location.positions is None:
        return ["all"]
    return [str(position) for position in location.positions] + ["generated"] * location.generated


def _agreement(result: Attribution) -> str:
    found = result.agreement
    parts = [f"{result.n_examples} prompts", f"z[c] − z[w] = {_signed(result.logit_difference)}"]
    if found is not None:
        parts += [
            f"Pearson {_signed(found.pearson)}",
            f"Spearman {_signed(found.spearman)}",
            f"{round(found.overlap * found.n_top)} of the {found.n_top} outlined shared",
        ]
    return "  ·  ".join(parts)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _checked(limit: float | None) -> float | None:
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: got {limit}, expected a positive number")
    return limit
