"""What a sweep found: effectiveness against the number of active scalars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .drawing import DASHES, FAINT, FROZEN, HEADING, INK, NAMES, WORDS, colour_bar, ink, plain, series, wrapped, written
from .ticks import linear_ticks, log_ticks, padded, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Score = Literal["flips", "effectiveness"]
_LABELS = {
    "flips": "steered answer above the other,\nshare of held-out prompts, mean of β = ±1",
    "effectiveness": "−E of the last step, logits",
}


class Sweep(Protocol):
    """The result of a sweep; each fit has settings, intervention, history, evaluation, error, n_active, score(by)."""

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

    Colours show λ_M where it differs between fits. The score "flips" has an axis from 0 to 1 and a dashed line for the
    frozen model.

    Args:
        result: the result of `sweep` or `load_sweep`.
        path, dpi: as in `heatmap`.
        by: the score, as `SweepResult.pareto` takes it.
        title: the first line; default "Effectiveness against minimality".
        ax: draw into these axes instead of a new figure; see `heatmap`.

    Returns:
        The figure.

    Raises:
        TypeError: `ax` is not a matplotlib Axes.
        ValueError: no complete fit, or a suffix that is not a picture format.
    """
    from .figures import panels

    score = by or result.best_score
    front = result.pareto(score)
    if not front:
        raise ValueError("result: got no whole fit, expected at least one")
    fits = [fit for fit in result.fits if fit.error is None and fit.history]
    figure, (axis,) = panels(ax, 1, 1, figsize=(7.4, 4.6), dpi=dpi)
    x, y = [fit.n_active for fit in front], [fit.score(score) for fit in front]
    most = max(fit.n_active for fit in fits)
    # The front goes on to the right: more scalars never make the best fit so far worse.
    axis.step([*x, max(most, x[-1])], [*y, y[-1]], where="post", color=FAINT, linewidth=1.2, zorder=1)
    _points(figure, axis, fits, {id(fit) for fit in front}, score)
    for value in _frozen(fits) if score == "flips" else ():
        axis.axhline(value, color=FAINT, linewidth=1.2, linestyle=DASHES, zorder=0, label=FROZEN)
    axis.set_xlabel(f"active scalars (not 0) of {max(fit.intervention.n_parameters for fit in fits)}")
    axis.set_ylabel(_LABELS[score])
    linear_ticks(axis.xaxis, 8, integer=True)
    axis.set_xlim(*padded(0, most or 1, 0.03))
    if score == "flips":
        axis.set_ylim(*padded(0, 1))
    plain(axis, grid="y")
    handles, labels = axis.get_legend_handles_labels()
    if FROZEN in labels:
        repeated = [index for index, label in enumerate(labels) if label == FROZEN][1:]  # one line per set of examples
        handles, labels = ([one for i, one in enumerate(some) if i not in repeated] for some in (handles, labels))
        axis.legend(handles, labels, frameon=False, fontsize=WORDS, labelcolor=ink(axis), loc="lower right")
    words: dict[str, Any] = {"color": ink(axis)}
    count, width = f"{len(fits)} fits, {len(front)} on the front", axis.get_window_extent().width / figure.dpi
    heading = wrapped(title or "Effectiveness against minimality", width)
    if 0.1 * len(heading) + 0.08 * len(count) > width:
        heading += "\n"  # above the count
    axis.set_title(heading, loc="left", fontsize=HEADING, fontweight="bold", **words)
    axis.set_title(count, loc="right", fontsize=WORDS, **words)
    return written(figure, path)


def _points(figure: Figure, axis: Axes, fits: Sequence[Any], best: set[int], score: Score) -> None:
    """A point for each fit, in the colour of its λ_M if these differ."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    weights = [fit.settings["minimality"] for fit in fits]
    positive = sorted({weight for weight in weights if weight > 0})
    colours = ListedColormap(colormaps["viridis"]([index / 255 for index in range(236)]))  # its end is too pale
    norm = LogNorm(positive[0], positive[-1]) if len(positive) > 1 else None
    for fit, weight in zip(fits, weights, strict=True):
        on_front = id(fit) in best
        axis.scatter(
            fit.n_active, fit.score(score), s=58 if on_front else 34, zorder=3 if on_front else 2, clip_on=False,
            color=colours(norm(weight)) if norm and weight > 0 else series(0)[0],
            edgecolor=INK if on_front else "none", linewidth=0.9,
        )  # fmt: skip
    if norm:
        bar = colour_bar(figure, norm, colours, ax=axis, pad=0.02, aspect=28)
        bar.set_label("λ, weight of the ℓ1 norm", fontsize=NAMES, color=ink(axis))
        bar.ax.yaxis.set_major_locator(FixedLocator(log_ticks(positive[0], positive[-1])))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(short))
        bar.ax.yaxis.set_minor_locator(NullLocator())


def _frozen(fits: Sequence[Any]) -> list[float]:
    """The frozen model's scores; there is one unless the fits were evaluated on different examples."""
    found = [fit.evaluation.baseline for fit in fits if fit.evaluation is not None]
    return sorted({round((one.flip_to_correct + one.flip_to_wrong) / 2, 4) for one in found if one is not None})
