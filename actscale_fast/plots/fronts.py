"""What a sweep found: effectiveness against the number of active scalars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .drawing import FAINT, INK, colour_bar, plain, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Score = Literal["flips", "effectiveness"]
_LABELS = {
    "flips": "share of held-out answers flipped, mean of both directions",
    "effectiveness": "−E of the last step, logits",
}
_BLUE = "#3b6fb6"


class Sweep(Protocol):
    """The result of a sweep; each fit has its settings, intervention, history, error, n_active and score(by)."""

    @property
    def fits(self) -> Sequence[Any]: ...
    @property
    def best_score(self) -> Score: ...
    def pareto(self, by: Score | None = None) -> Sequence[Any]: ...


def pareto(
    result: Sweep,
    path: str | os.PathLike[str] | None = None,
    *,
    by: Score | None = None,
    title: str | None = None,
    dpi: int = 160,
    ax: Axes | None = None,
) -> Figure:
    """Draw the score of every fit of a sweep against its active scalars, and the front that no fit beats.

    Colours show λ_M where it differs between fits.

    Args:
        result: the result of `sweep` or `load_sweep`.
        path, dpi: as in `heatmap`.
        by: the score, as `SweepResult.pareto` takes it.
        title: the first line; default "Effectiveness against minimality".
        ax: draw into these axes instead of a new figure; their figure is returned, and written where a path is given.

    Raises:
        ValueError: no complete fit, or a suffix that is not a picture format.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    from .figures import one_axis

    score = by or result.best_score
    front = result.pareto(score)
    if not front:
        raise ValueError("result: got no whole fit, expected at least one")
    fits = [fit for fit in result.fits if fit.error is None and fit.history]
    weights = [fit.settings["minimality"] for fit in fits]
    positive = sorted({weight for weight in weights if weight > 0})
    colours, norm = LinearSegmentedColormap.from_list("weights", ["#9cc3e4", _BLUE, "#7a1f6b"]), None
    if len(positive) > 1:
        norm = LogNorm(positive[0], positive[-1])
    figure, axis = one_axis(ax, figsize=(7.2, 4.4), dpi=dpi)
    x, y = [fit.n_active for fit in front], [fit.score(score) for fit in front]
    axis.step(x, y, where="post", color=FAINT, linewidth=1.2, zorder=1)
    best = {id(fit) for fit in front}
    for fit, weight in zip(fits, weights, strict=True):
        on_front = id(fit) in best
        axis.scatter(
            fit.n_active, fit.score(score), s=46 if on_front else 26, zorder=3 if on_front else 2,
            color=colours(norm(weight)) if norm and weight > 0 else _BLUE,
            edgecolor=INK if on_front else "none", linewidth=0.8, alpha=1.0 if on_front else 0.75,
        )  # fmt: skip
    axis.set_xlabel(f"active scalars of {max(fit.intervention.n_parameters for fit in fits)}")
    axis.set_ylabel(_LABELS[score])
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_xlim(left=min(0, min(fit.n_active for fit in fits)) - 0.5)
    plain(axis, grid="y")
    if norm:
        bar = colour_bar(figure, norm, colours, ax=axis, pad=0.02, aspect=28)
        bar.set_label("λ, weight of the ℓ1 norm", fontsize=9, color=INK)
    count = f"{len(fits)} fits, {len(front)} that no other beats"
    axis.set_title(title or "Effectiveness against minimality", loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.set_title(count, loc="right", fontsize=8.5, color=INK)
    return written(figure, path)
