"""What a sweep found: effectiveness against the number of active scalars."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .drawing import BLANK, FAINT, INK, plain, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..learning import SweepResult
    from ..learning.sweep.result import Score

_LABELS = {
    "flips": "share of held-out answers flipped, mean of both directions",
    "effectiveness": "−E of the last step, logits",
}


def pareto(
    result: SweepResult,
    path: str | os.PathLike[str] | None = None,
    *,
    by: Score | None = None,
    title: str | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw every fit of a sweep, its score against its active scalars, and the front that no fit beats.

    Colours tell λ_M where it differs between fits.

    Args:
        result: of `sweep` or `load_sweep`.
        path: where to write the picture, in the format of its suffix (.png, .pdf, .svg); None: nowhere.
        by: the score, as `SweepResult.pareto` takes it.
        title: the first line; default "Effectiveness against minimality".
        dpi: dots an inch of a .png.

    Raises:
        ValueError: no whole fit, or a suffix that is no format of pictures.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    score = by or result.best_score
    front = result.pareto(score)
    if not front:
        raise ValueError("result: got no whole fit, expected at least one")
    fits = [fit for fit in result.fits if fit.error is None and fit.history]
    weights = [fit.settings["minimality"] for fit in fits]
    figure = Figure(figsize=(7.2, 4.4), dpi=dpi, layout="constrained")
    axis = figure.subplots()
    told = len({weight for weight in weights if weight > 0}) > 1
    colours = LinearSegmentedColormap.from_list("weights", ["#9cc3e4", "#3b6fb6", "#7a1f6b"])
    positive = [weight for weight in weights if weight > 0] or [1.0]
    norm = LogNorm(min(positive), max(positive) * (1 if told else 2))
    shades = [colours(norm(weight)) if told and weight > 0 else "#3b6fb6" for weight in weights]
    best = {id(fit) for fit in front}
    axis.step(
        [fit.n_active for fit in front], [fit.score(score) for fit in front], where="post", color=FAINT, linewidth=1.2,
        zorder=1,
    )  # fmt: skip
    for fit, shade in zip(fits, shades, strict=True):
        on_front = id(fit) in best
        axis.scatter(
            fit.n_active, fit.score(score), s=46 if on_front else 26, color=shade, zorder=3 if on_front else 2,
            edgecolor=INK if on_front else "none", linewidth=0.8, alpha=1.0 if on_front else 0.75,
        )  # fmt: skip
    axis.set_xlabel(f"active scalars of {max(fit.intervention.n_parameters for fit in fits)}")
    axis.set_ylabel(_LABELS[score])
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_xlim(left=min(0, min(fit.n_active for fit in fits)) - 0.5)
    axis.grid(axis="y", color=BLANK, linewidth=0.9)
    axis.set_axisbelow(True)
    plain(axis)
    if told:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, pad=0.02, aspect=28)
        bar.set_label("λ, weight of the ℓ1 norm", fontsize=9, color=INK)
        bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
        bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which matplotlib's annotation hides
    count = f"{len(fits)} fits, {len(front)} that no other beats"
    axis.set_title(title or "Effectiveness against minimality", loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.set_title(count, loc="right", fontsize=8.5, color=INK)
    return written(figure, path)
