"""Maps of heads (or positions) by layers: the scalars of an intervention, and the scores of an attribution."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures.location import Location
from ..interventions import ActivScalar, Intervention
from ..interventions.scalar import VISIBLE
from .drawing import written
from .panels import Names, Panel, panels_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLACES = {
    "head": "attention heads",
    "attn_out": "attention outputs",
    "mlp_out": "MLP outputs",
    "residual": "residual stream",
}


def heatmap(
    intervention: Intervention | Sequence[Intervention],
    path: str | os.PathLike[str] | None = None,
    *,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    limit: float | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw the scalars of an ActivScalar, layers from left to right: red amplifies, blue suppresses, blank is 0.

    Rows are heads (with a panel per position) or, at a whole site, positions. Every scalar that is not exactly 0 has an
    outline, dotted where its magnitude is at most 5 % of the largest one, which is too pale to be seen; the second line
    counts both. Several interventions are drawn side by side in one colour scale.

    Args:
        intervention: an ActivScalar that is not a stack; or several with the same layers and positions, as a list or a
            Composite (whose factors multiply the scalars).
        path: where to write the picture, atomically and in the format of its suffix (.png, .pdf, .svg); None: no file.
        tokens: what is at each position of the intervention, as a label of its row (or panel): the tokens of several
            prompts, a list for each, which name a position only where all prompts share the token; or a single list of
            words that are right for all prompts. As text, or as `convert_ids_to_tokens` returns them.
        title: the first line of the title; default "Activation scalars".
        limit: the |α| shown in full colour; None: the largest one.
        dpi: dots per inch of a .png file.
        ax: draw into these axes instead of a new figure: a matplotlib Axes, or where the picture has several maps, one
            for each in a list or an array. Their figure is returned, and written where a path is given.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        TypeError: not an ActivScalar, or `ax` has something that is not a matplotlib Axes.
        ValueError: a stack, interventions with different layers, positions or heads, more or fewer tokens than
            positions, a limit that is not positive, more or fewer axes than maps, or a suffix that is not a picture
            format.

    Example::

        heatmap(intervention, "heads.png")
        heatmap(intervention, tokens=[tokenizer(example.prompt).tokens() for example in train])
    """
    parts = _parts(intervention)
    location = parts[0][1].location
    labels = _labels(location, tokens)
    scaled = [factor * part.alpha.detach() for factor, part in parts]
    seen = VISIBLE * max(float(values.abs().max()) for values in scaled)
    columns = []
    for whole, (_, part) in zip(scaled, parts, strict=True):
        place = _place(part.location) if len(parts) > 1 else None
        columns.append(
            [
                Panel(values, "α", "  ·  ".join(filter(None, (place, name))) or None, faint=abs(values) <= seen)
                for name, values in _maps(whole, location, labels)
            ]
        )
    l1 = sum(abs(factor) * part.l1 for factor, part in parts)
    n_active = sum(part.n_active for factor, part in parts if factor)
    summary = f"{n_active} of {sum(part.n_parameters for _, part in parts)} active (not 0)"
    if n_active:
        above = sum(int((values.abs() > seen).sum()) for values in scaled)
        summary += f", {above} of them above {VISIBLE:.0%} of the largest"
    summary += f"  ·  ‖α‖₁ = {l1:.2f}"
    figure = panels_figure(
        [panel for row in zip(*columns, strict=True) for panel in row],
        _names(location, labels, every_row=tokens is not None and location.site != "head"),
        title=title or "Activation scalars",
        summary=summary if len(parts) > 1 else f"{summary}  ·  {_place(location)}",
        limit=_checked(limit),
        dpi=dpi,
        columns=len(parts),
        ax=ax,
    )
    return written(figure, path)


def _parts(given: Any) -> list[tuple[float, ActivScalar]]:
    """(factor, intervention) of each column."""
    several = isinstance(given, list | tuple)
    pairs = [pair for one in (given if several else [given]) for pair in getattr(one, "pairs", [(1.0, one)])]
    if not pairs:
        raise ValueError("intervention: got none, expected at least one ActivScalar")
    for _, part in pairs:
        if not isinstance(part, ActivScalar):
            raise TypeError(f"intervention: got {type(part).__name__}, expected an ActivScalar")
        if part.n_groups is not None:
            raise ValueError(f"intervention: got a stack of {part.n_groups}, expected a single intervention")
    kinds = {
        (part.location.layers, part.location.positions, part.location.generated, part.location.n_heads)
        for _, part in pairs
    }
    if len(kinds) > 1:
        raise ValueError("intervention: got several of different layers, positions or heads, expected the same of all")
    return pairs


def attribution(
    result: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    limit: float | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw the predicted change when each head is removed, −score, above the measured change.

    Both are changes of the mean logit difference z[c] − z[w] in one colour scale: without a blue head the difference
    falls, so it speaks for the correct answer; a red one speaks against it. Scores of an objective are another quantity
    and have their own scale. Outlines mark the largest of each map.

    Args:
        result: the `Attribution` that `attribution` returns; without knock-outs only the prediction is drawn.
        path, dpi: as in `heatmap`.
        title: the first line of the title; default "Removing one head at a time".
        limit: the magnitude shown in full colour; None: the largest one.
        ax: draw into these axes instead of a new figure, one for each map; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: not an Attribution, or `ax` has something that is not a matplotlib Axes.
        ValueError: a limit that is not positive, more or fewer axes than maps, or a suffix that is not a picture
            format.
    """
    if not hasattr(result, "knock_out"):
        raise TypeError(f"result: got {type(result).__name__}, expected an Attribution")
    location = result.location
    change = "Δ logits"
    predicted = ("predicted: the gradient at α = 0", change if result.objective is None else "Δ objective")
    panels, slots = [], _labels(location)
    for tensor, (label, quantity) in ((-result.scores, predicted), (result.knock_out, ("measured", change))):
        if tensor is not None:
            largest = torch.zeros(tensor.numel(), dtype=torch.bool, device="cpu")
            largest[tensor.flatten().abs().topk(result.n_top).indices] = True
            marks = _maps(largest.view(tensor.shape), location, slots)
            for (name, values), (_, marked) in zip(_maps(tensor, location, slots), marks, strict=True):
                panels.append(Panel(values, quantity, f"{label}  ·  {name}" if name else label, marked > 0))
    thing = "head" if location.site == "head" else f"layer's {_place(location, plural=False)}"
    figure = panels_figure(
        panels,
        _names(location, slots),
        title=title or f"Removing one {thing} at a time",
        summary=_agreement(result),
        limit=_checked(limit),
        dpi=dpi,
        ax=ax,
    )
    return written(figure, path)


def _place(location: Location, *, plural: bool = True) -> str:
    """What is edited, in words."""
    if location.site != "head" and location.named_module is not None:  # any module of a layer
        return f"output{'s' * plural} of {location.named_module}"
    return _PLACES[location.site] if plural else _PLACES[location.site].removesuffix("s")


def _maps(values: Any, location: Location, slots: Sequence[str]) -> list[tuple[str | None, Any]]:
    """A tensor [L, P, H] as named NumPy maps [rows, layers]."""
    array = values.float().cpu().numpy()
    if location.site != "head":
        return [(None, array[:, :, 0].T)]
    names = [name if name == "generated" else f"position {name}" for name in slots] if len(slots) > 1 else [None]
    return [(name, array[:, slot].T) for slot, name in enumerate(names)]


def _names(location: Location, slots: Sequence[str], every_row: bool = False) -> Names:
    if location.site == "head":
        return Names(location.layers, [str(head) for head in range(location.n_heads)], "head")
    return Names(location.layers, list(slots), "position", every_row)


def _labels(location: Location, tokens: Any = None) -> list[str]:
    """The name of each slot: the position's number, after its token where the prompts share it."""
    if location.positions is None:
        if tokens is not None:
            raise ValueError("tokens: the intervention has no positions, expected none")
        return ["all"]
    names = [str(position) for position in location.positions]
    if tokens is not None:
        shared = _shared(tokens, len(names))
        wide = max(map(len, names), default=0)
        names = [f"{token}  {name:\u2007>{wide}}" for token, name in zip(shared, names, strict=True)]
    return names + ["generated"] * location.generated


def _shared(tokens: Any, number: int) -> list[str]:
    """The readable token of each slot, or "(varies)" where the prompts have different ones."""
    prompts = [tokens] if isinstance(tokens, str) or all(isinstance(token, str) for token in tokens) else list(tokens)
    for prompt in prompts:
        if isinstance(prompt, str) or len(prompt) != number:
            raise ValueError(
                f"tokens: got {prompt if isinstance(prompt, str) else len(prompt)}, expected a list of one for each of "
                f"the {number} positions"
            )
    slots = (set(map(_readable, slot)) for slot in zip(*prompts, strict=True))
    return [slot.pop() if len(slot) == 1 else "(varies)" for slot in slots]


def _readable(token: str) -> str:
    """A token as a label, without tokenizers' marks of a space and with line breaks visible."""
    text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    return text.replace("\n", "↵").replace("$", r"\$").strip() or "␣"


def head_scores(
    scores: Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    chosen: Tensor | None = None,
    title: str | None = None,
    limit: float | None = None,
    dpi: int = 160,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw a score of every head, layers from left to right: red is above 0, blue is below.

    Args:
        scores: [L, H], finite.
        path, dpi: as in `heatmap`.
        layers: the numbers of the layers; None: 0, 1, ….
        chosen: bool [L, H], the heads with an outline; None: none.
        title: the first line of the title; default "Scores of heads".
        limit: the magnitude shown in full colour; None: the largest one.
        ax: draw into this axes instead of a new figure.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        TypeError: scores that are not a tensor, or `ax` is not a matplotlib Axes.
        ValueError: tensors of other shapes, scores that are not finite, a limit that is not positive, or a suffix that
            is not a picture format.

    Example::

        head_scores(selection.scores, "scores.png", layers=selection.location.layers, chosen=selection.chosen)
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: got {type(scores).__name__}, expected a tensor [L, H]")
    if scores.dim() != 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected finite values [L, H]")
    marked = torch.zeros_like(scores, dtype=torch.bool) if chosen is None else chosen
    if marked.shape != scores.shape:
        raise ValueError(f"chosen: got shape {tuple(marked.shape)}, expected {tuple(scores.shape)} like scores")
    numbers = range(scores.shape[0]) if layers is None else list(layers)
    if len(numbers) != scores.shape[0]:
        raise ValueError(f"layers: got {len(numbers)}, expected {scores.shape[0]}, one for each row of scores")
    values, outlined = scores.detach().float().cpu().T.numpy(), marked.cpu().T.numpy()
    summary = f"{int(marked.sum())} of {marked.numel()} heads are outlined" if chosen is not None else ""
    names = Names(numbers, [str(head) for head in range(scores.shape[1])], "head")
    figure = panels_figure(
        [Panel(values, "score", None, outlined)], names, title=title or "Scores of heads", summary=summary,
        limit=_checked(limit), dpi=dpi, ax=ax,
    )  # fmt: skip
    return written(figure, path)


def _agreement(result: Any) -> str:
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
