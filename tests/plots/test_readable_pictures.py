"""Pictures can be read: whole markers, labelled axes, the frozen model beside what is compared, on light and dark."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actscale_fast import plots
from actscale_fast.architectures.location import Location, ModelFingerprint
from actscale_fast.interventions import ActivScalar
from actscale_fast.learning import Attribution
from actscale_fast.plots import Measured, PathPoint
from actscale_fast.plots.drawing import SERIES, series
from actscale_fast.plots.ticks import log_axis, log_ticks

FROZEN = "frozen model"


def scalars(values: Any = (1.0, -0.5), site: str = "head", positions: tuple[int, ...] | None = None) -> ActivScalar:
    model = ModelFingerprint("llama", 2, 4, 8, 32)
    made = ActivScalar(Location(layers=(0, 1), site=site, positions=positions, generated=False, model=model))
    with torch.no_grad():
        made.alpha.flatten()[: len(values)] = torch.tensor(values)
    return made


def records(n: int = 4, effectiveness: float = 2.0) -> list[dict[str, float]]:
    terms = {"effectiveness": effectiveness, "faithfulness": 0.1, "minimality": 3.0, "n_active": 5}
    return [{"step": step, "loss": 0.0} | terms for step in range(n)]


def evaluated(correct: float, wrong: float) -> Any:
    baseline = SimpleNamespace(flip_to_correct=0.2, flip_to_wrong=0.6)
    return SimpleNamespace(flip_to_correct=correct, flip_to_wrong=wrong, baseline=baseline)


def sweep_of(*fits: tuple[int, float, float]) -> Any:
    """A sweep of fits with (active scalars, share of both flips, weight of the ℓ1 norm)."""
    made = [
        SimpleNamespace(
            n_active=n, settings={"minimality": weight}, intervention=SimpleNamespace(n_parameters=8), history=[{}],
            error=None, evaluation=evaluated(flips, flips), score=lambda by, flips=flips: flips,
        )
        for n, flips, weight in fits
    ]  # fmt: skip
    return SimpleNamespace(fits=made, best_score="flips", pareto=lambda by: made)


def attributed() -> Attribution:
    location = scalars().location
    scores = torch.arange(1.0, 9.0).view(2, 1, 4)
    return Attribution(scores, -0.5 * scores, location, 5, -1.5)


RUN = [PathPoint(0, 0.0, 1.0, kl=0.0), PathPoint(9, 1.0, 0.0, kl=0.5)]
ROWS = [
    Measured("heads", "flipped", (1.0, 1.0), "training", baseline=0.0),
    Measured("heads", "flipped", (1.0,), "held out", baseline=0.1),
    Measured("heads", "active", (30.0,), "held out"),
    Measured("vectors", "active", (110_000.0,), "held out"),
]
CURVES: dict[str, Any] = {"one": ([0.0, 1.0], [[0.9, 1.0], [0.8, 1.0]]), "other": ([0.0, 1.0], [1.0, 0.0])}


def assert_markers_are_whole(axis: Any) -> None:
    """Every marker lies in the axes with its whole size."""
    box = axis.get_window_extent()
    for line in axis.lines:
        if line.get_marker() in ("None", None, "") or not line.get_clip_on():
            continue
        radius = line.get_markersize() / 2 * axis.get_figure(root=True).dpi / 72
        for x, y in axis.transData.transform(line.get_xydata()):
            assert box.x0 + radius <= x <= box.x1 - radius
            assert box.y0 + radius <= y <= box.y1 - radius


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.comparison(ROWS, log=["active"]),
        lambda: plots.path({"a": RUN, "b": RUN}, kl=True),
        lambda: plots.path({"a": RUN}, log=True),
        lambda: plots.strengths(CURVES, ylabel="share"),
        lambda: plots.strengths(CURVES, ylabel="share", ylim=(0, 1)),
        lambda: plots.history(records(effectiveness=-2.0)),
    ],
)
def test_markers_at_the_ends_of_an_axis_are_whole(draw: Any) -> None:
    figure = draw()
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert_markers_are_whole(axis)


@pytest.mark.parametrize("high", [1.3, 2.0, 7.0, 25.0, 400.0, 2e4, 3e9])
@pytest.mark.parametrize("low", [1.0, 0.03, 2.2])
def test_a_logarithmic_axis_has_at_least_three_labels_and_not_too_many(low: float, high: float) -> None:
    ticks = log_ticks(low, low * high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= low * high for tick in ticks)
    assert ticks == sorted(set(ticks))


def shown_labels(axis: Any) -> list[str]:
    low, high = axis.get_view_interval()
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_logarithmic_pictures_have_labels_enough() -> None:
    strengths = plots.strengths({"a": ([0, 1], [2.5, 4.1])}, ylabel="perplexity", log=True)
    comparison = plots.comparison(ROWS, log=["active"])
    front = plots.pareto(sweep_of((1, 0.5, 2.6), (7, 0.9, 0.05)))
    for figure, axis in (
        (strengths, strengths.axes[0].yaxis),
        (comparison, comparison.axes[1].xaxis),
        (front, front.axes[1].yaxis),
    ):
        figure.draw_without_rendering()
        labels = shown_labels(axis)
        assert len(labels) >= 3
        assert all(labels)
    assert shown_labels(comparison.axes[1].xaxis) == ["100", "1k", "10k", "100k"]


def legend_of(figure: Any) -> list[str]:
    found = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    return [text.get_text() for legend in found if legend is not None for text in legend.get_texts()]


def test_the_frozen_model_stands_beside_what_is_compared() -> None:
    comparison = plots.comparison(ROWS, log=["active"])
    assert legend_of(comparison) == ["training", "held out", FROZEN]
    places = [segment[0][0] for lines in comparison.axes[0].collections for segment in lines.get_segments()]
    assert places == [0.0, 0.1]

    path = plots.path({"a": RUN, "b": RUN}, baseline={"a": PathPoint(0, 0.2, 0.7)})
    assert legend_of(path) == ["a", "b", FROZEN]
    assert [list(axis.lines[1].get_ydata()) for axis in path.axes] == [[0.2, 0.2], [0.7, 0.7]]

    front = plots.pareto(sweep_of((1, 0.5, 1.0), (7, 0.9, 1.0)))
    assert legend_of(front) == [FROZEN]
    assert [list(line.get_ydata()) for line in front.axes[0].lines if line.get_label() == FROZEN] == [[0.4, 0.4]]

    strengths = plots.strengths(CURVES, ylabel="share", baseline=([0.0, 1.0], [0.3, 0.4]))
    assert [text.get_text() for text in strengths.axes[0].texts] == [FROZEN]
    assert list(strengths.axes[0].lines[-1].get_ydata()) == [0.3, 0.4]


@pytest.mark.parametrize(
    ("baseline", "error", "message"),
    [
        ({"c": PathPoint(0, 0, 0)}, ValueError, "baseline: got 'c', expected some of a"),
        (0.5, TypeError, "baseline: got float, expected a PathPoint"),
    ],
)
def test_a_baseline_belongs_to_a_curve(baseline: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.path({"a": RUN}, baseline=baseline)


def test_shares_are_drawn_from_0_to_1_and_a_band_says_what_it_is() -> None:
    figure = plots.strengths({"one": CURVES["one"]}, ylabel="share", ylim=(0, 1))
    low, high = figure.axes[0].get_ylim()
    assert -0.1 < low < 0
    assert 1 < high < 1.1
    assert legend_of(figure) == ["one, mean", "band: smallest to largest of 2 seeds"]
    low, high = plots.pareto(sweep_of((1, 0.5, 1.0))).axes[0].get_ylim()
    assert low < 0 < 1 < high


def test_scalars_too_small_to_be_seen_are_counted_and_dotted() -> None:
    made = scalars((2.0, -1.0, 0.1, 0.001))
    assert (made.n_active, made.count_above(), made.count_above(0.01), made.count_above(0)) == (4, 2, 3, 4)
    assert "4 of 8 parameters are active (not 0), 2 of them above 5% of the largest" in str(made)
    figure = plots.heatmap(made)
    assert figure.texts[1].get_text().startswith("4 of 8 active (not 0), 2 of them above 5% of the largest")
    filled: Any = figure.axes[0].collections[1]
    assert [dashes is not None for _, dashes in filled.get_linestyle()] == [False, False, True, True]
    for share in (-0.1, 1.5, float("nan"), True, "5%"):
        with pytest.raises(ValueError, match="share: got"):
            made.count_above(share)  # type: ignore[arg-type]


def test_a_row_is_named_by_its_token_only_where_all_prompts_share_it() -> None:
    made = scalars(site="mlp_out", positions=(0, 1, 2))
    prompts = [["The", "ĠParis", "Ġis"], ["The", "ĠRome", "Ġis"]]
    labels = [label.get_text() for label in plots.heatmap(made, tokens=prompts).axes[0].get_yticklabels()]
    assert labels == ["The  0", "(varies)  1", "is  2"]
    with pytest.raises(ValueError, match="tokens: got 2, expected a list of one for each of the 3 positions"):
        plots.heatmap(made, tokens=[prompts[0], ["a", "b"]])


DRAWN: list[tuple[int, Any]] = [
    (1, lambda ax: plots.heatmap(scalars(), ax=ax)),
    (2, lambda ax: plots.heatmap(scalars(positions=(0, 1)), ax=ax)),
    (2, lambda ax: plots.attribution(attributed(), ax=ax)),
    (4, lambda ax: plots.history(records(), ax=ax)),
    (1, lambda ax: plots.history(records(), terms="faithfulness", title="fit", ax=ax)),
    (1, lambda ax: plots.overlap([[1.0, 0.2], [0.2, 1.0]], ["a", "b"], ax=ax)),
    (1, lambda ax: plots.strengths(CURVES, ylabel="share", baseline=0.5, ax=ax)),
    (2, lambda ax: plots.path({"a": RUN, "b": RUN}, ax=ax)),
    (1, lambda ax: plots.pareto(sweep_of((1, 0.5, 1.0)), ax=ax)),
    (2, lambda ax: plots.comparison(ROWS, ax=ax)),
]


@pytest.mark.parametrize(("number", "draw"), DRAWN)
def test_every_picture_can_be_drawn_into_the_axes_of_a_caller(number: int, draw: Any) -> None:
    from matplotlib.figure import Figure

    mine = Figure(figsize=(9, 6))
    grid = mine.subplots(2, 3)
    given, others = grid.ravel()[:number], grid.ravel()[number:]
    assert draw(given[0] if number == 1 else given) is mine
    assert all(axis.has_data() or axis.texts or axis.patches for axis in given)
    assert not any(axis.has_data() or axis.texts for axis in others)
    assert not mine.legends
    mine.draw_without_rendering()
    if number > 1:
        with pytest.raises(ValueError, match=f"ax: got 1 Axes, expected {number}, one for each"):
            draw(grid[0, 0])
        with pytest.raises(TypeError, match=rf"ax: got list, expected a matplotlib Axes for each of the {number} "):
            draw([1] * number)


def words_of(figure: Any) -> list[Any]:
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def lightness(colour: Any) -> float:
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def test_pictures_are_opaque_and_dark_on_white_whatever_the_style_of_matplotlib() -> None:
    import io

    import matplotlib as mpl
    from matplotlib import style
    from matplotlib.image import imread

    with style.context("dark_background"), mpl.rc_context({"savefig.transparent": True}):
        for figure in (
            plots.strengths(CURVES, ylabel="share", baseline=0.5, title="Curves"),
            plots.history(records(), title="A fit"),
            plots.heatmap(scalars()),
        ):
            pixels = imread(io.BytesIO(figure._repr_png_()[0]))  # type: ignore[attr-defined]
            assert (pixels[..., 3] == 1).all()
            assert pixels[0, 0].tolist() == [1, 1, 1, 1]
            assert all(lightness(text.get_color()) < 0.6 for text in words_of(figure))


def test_words_in_the_dark_figure_of_a_caller_are_pale() -> None:
    from matplotlib.figure import Figure

    mine = Figure(facecolor="black")
    axis = mine.subplots()
    plots.strengths(CURVES, ylabel="share", title="Curves", ax=axis)
    mine.draw_without_rendering()  # writes the numbers at the axes
    shown = {text.get_text(): lightness(text.get_color()) for text in words_of(mine)}
    names = ["Curves", "share", axis.get_xlabel(), *(text.get_text() for text in axis.get_legend().get_texts())]
    ticks = [text.get_text() for text in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    assert {*names, *ticks} <= shown.keys()
    assert min(shown.values()) > 0.6


def test_the_legend_of_a_front_keeps_the_labels_of_the_caller() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot([0, 8], [0.5, 0.5], label="mine")
    swept = sweep_of((1, 0.5, 2.6), (7, 0.9, 0.05))
    swept.fits[1].evaluation.baseline.flip_to_wrong = 0.4  # another set of examples: a second line, named once
    plots.pareto(swept, ax=axis)
    legend = axis.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["mine", FROZEN]
    mine, frozen = legend.get_lines()
    assert mine.get_linestyle() == "-"
    assert frozen.get_linestyle() != "-"


@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [0.0, 0.0, 300.0]])
def test_a_logarithmic_axis_shows_a_zero_and_labels_that_do_not_overlap(values: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    log_axis(axis.xaxis, values)
    assert axis.get_xlim()[0] < 0
    assert 0.0 in axis.get_xticks()
    figure.draw_without_rendering()
    low, high = axis.get_xlim()
    boxes = [
        label.get_window_extent()
        for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        if low <= place <= high
    ]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_term_that_is_misspelt_is_named() -> None:
    with pytest.raises(ValueError, match=r"terms: got 'faithfullness', expected some of .*did you mean 'faithfulness'"):
        plots.history(records(), terms="faithfullness")
    with pytest.raises(ValueError, match="terms: got none"):
        plots.history(records(), terms=[])


def test_an_effectiveness_below_0_is_drawn() -> None:
    axis = plots.history(records(effectiveness=-2.0), terms="effectiveness").axes[0]
    assert axis.get_ylim()[0] < -2.0


def test_a_long_title_is_not_cut() -> None:
    title = "Indirect object identification: longer prompts than those that it was learned on"
    for figure in (
        plots.strengths(CURVES, ylabel="share", title=title),
        plots.strengths({"a": ([0.0, 1.0], [1.0, 2.0])}, ylabel="share", title=title),
        plots.pareto(sweep_of((1, 0.5, 2.6), (7, 0.9, 0.05)), title=title),
        plots.heatmap(scalars(), title=title),
    ):
        figure.draw_without_rendering()
        (found,) = [text for text in words_of(figure) if "Indirect" in text.get_text()]
        assert found.get_window_extent().x1 <= figure.bbox.x1


def test_36_curves_differ_in_their_colour_or_their_mark() -> None:
    assert len({series(number) for number in range(36)}) == 36
    assert {series(number) for number in range(6)} == set(SERIES)
