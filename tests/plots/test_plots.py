"""Pictures: what is drawn is what the intervention holds, and files appear whole or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actscale_fast import plots
from actscale_fast.architectures.location import Location, ModelFingerprint
from actscale_fast.interventions import ActivScalar, SteerVec
from actscale_fast.learning import Attribution, Objective
from actscale_fast.plots import Measured, PathPoint

PNG = b"\x89PNG\r\n\x1a\n"


def scalars(layers: tuple[int, ...] = (0, 1, 2), heads: int = 4, **place: Any) -> ActivScalar:
    fields = {"site": "head", "positions": None, "generated": False} | place
    model = ModelFingerprint("llama", max(layers) + 1, heads, 8, 8 * heads)
    return ActivScalar(Location(layers=layers, model=model, **fields))


def collections_of(axis: Any) -> tuple[Any, Any]:
    """The cells of all scalars, and those of the active ones."""
    every, active = axis.collections
    return every, active


def test_only_scalars_that_are_not_zero_are_coloured() -> None:
    intervention = scalars()
    with torch.no_grad():
        intervention.alpha[1, 0, 2] = 1e-6
        intervention.alpha[2, 0, 3] = -0.5
    every, active = collections_of(plots.heatmap(intervention).axes[0])
    assert len(every.get_paths()) == 12
    centres = {tuple(path.get_extents().get_points().mean(0).round().astype(int)) for path in active.get_paths()}
    assert centres == {(1, 2), (2, 3)}  # (layer, head)


def test_colours_are_centred_on_zero_and_opposite_signs_take_opposite_hues() -> None:
    intervention = scalars()
    with torch.no_grad():
        intervention.alpha[0, 0, 0], intervention.alpha[0, 0, 1] = 2.0, -0.5
    figure = plots.heatmap(intervention)
    bar = figure.axes[-1]
    assert bar.get_ylim() == (-2.0, 2.0)
    positive, negative = collections_of(figure.axes[0])[1].get_facecolor()
    assert positive[0] > positive[2]
    assert negative[2] > negative[0]


def test_the_title_counts_the_active_scalars_and_their_norm() -> None:
    intervention = scalars()
    with torch.no_grad():
        intervention.alpha[0, 0, 0], intervention.alpha[2, 0, 1] = 1.5, -0.25
    texts = [text.get_text() for text in plots.heatmap(intervention, title="Capitals").texts]
    assert texts[0] == "Capitals"
    assert texts[1].startswith("2 of 12 active")
    assert "= 1.75" in texts[1]


def test_ticks_name_the_chosen_layers_not_their_places() -> None:
    axis = plots.heatmap(scalars(layers=(3, 7))).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["3", "7"]


def test_heads_with_positions_have_a_panel_each_and_whole_sites_one_row_each() -> None:
    heads = plots.heatmap(scalars(positions=(0, -1), generated=True))
    assert [axis.get_title(loc="left") for axis in heads.axes[:-1]] == ["position 0", "position -1", "generated"]
    whole = plots.heatmap(scalars(site="mlp_out", positions=(0, -1)))
    assert len(whole.axes) == 2  # the map and its colour bar
    assert [label.get_text() for label in whole.axes[0].get_yticklabels()] == ["0", "-1"]


def test_an_intervention_that_does_nothing_can_be_drawn() -> None:
    figure = plots.heatmap(scalars())
    assert len(collections_of(figure.axes[0])[1].get_paths()) == 0


def test_tokens_label_the_rows_of_a_whole_site_and_the_panels_of_heads() -> None:
    tokens = ["ĠParis", "Ċ", "▁", "$5"]
    whole = plots.heatmap(scalars(site="mlp_out", positions=(0, 1, 2, -1), generated=True), tokens=tokens)
    labels = [label.get_text().replace("\u2007", "") for label in whole.axes[0].get_yticklabels()]
    assert labels == ["Paris  0", "↵  1", "␣  2", r"\$5  -1", "generated"]
    heads = plots.heatmap(scalars(positions=(0, 3)), tokens=["The", " capital"])
    assert [axis.get_title(loc="left") for axis in heads.axes[:-1]] == ["position The  0", "position capital  3"]


def test_every_position_is_labelled_where_there_are_tokens() -> None:
    long = scalars(site="mlp_out", positions=tuple(range(40)))
    assert len(plots.heatmap(long, tokens=["a"] * 40).axes[0].get_yticklabels()) == 40
    assert len(plots.heatmap(long).axes[0].get_yticklabels()) < 40


@pytest.mark.parametrize(
    ("positions", "tokens", "message"),
    [
        (None, ["a"], "tokens: the intervention has no positions"),
        ((0, 1), ["a"], "tokens: got 1, expected a list of one for each of the 2 positions"),
        ((0, 1), "ab", "tokens: got ab, expected a list"),
    ],
)
def test_tokens_for_other_positions_are_refused(positions: Any, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.heatmap(scalars(site="mlp_out", positions=positions), tokens=tokens)


def test_several_sites_stand_side_by_side_in_one_scale() -> None:
    attention, mlp = (scalars(site=site, positions=(0, 1, 2)) for site in ("attn_out", "mlp_out"))
    with torch.no_grad():
        attention.alpha[0, 1, 0], mlp.alpha[2, 2, 0] = 3.0, -1.0
    for given, limit in (([attention, mlp], 3.0), (attention + 4.0 * mlp, 4.0)):
        figure = plots.heatmap(given)
        left, right, bar = figure.axes
        assert [axis.get_title(loc="left") for axis in (left, right)] == ["attention outputs", "MLP outputs"]
        assert left.get_position().x1 < right.get_position().x0
        assert left.get_position().y0 == right.get_position().y0
        assert bar.get_ylim() == (-limit, limit)
        cells = [collections_of(axis)[1].get_paths()[0].get_extents().get_points().mean(0) for axis in (left, right)]
        assert [tuple(cell.round()) for cell in cells] == [(0, 1), (2, 2)]  # (layer, position)
        assert figure.texts[1].get_text().startswith("2 of 18 active")


def test_heads_of_several_interventions_have_a_column_each_and_a_row_a_position() -> None:
    figure = plots.heatmap([scalars(positions=(0, -1)), scalars(positions=(0, -1))])
    titles = [axis.get_title(loc="left") for axis in figure.axes[:-1]]
    assert titles == ["attention heads  ·  position 0"] * 2 + ["attention heads  ·  position -1"] * 2
    places = [tuple(axis.get_position().min.round(3)) for axis in figure.axes[:-1]]
    assert len(set(places)) == 4
    assert places[0][1] == places[1][1] > places[2][1]


def test_interventions_of_different_places_cannot_share_a_picture() -> None:
    for other in (scalars(layers=(0, 1)), scalars(positions=(0,)), scalars(site="mlp_out")):
        with pytest.raises(ValueError, match="intervention: got several of different layers, positions or heads"):
            plots.heatmap([scalars(), other])
    with pytest.raises(ValueError, match="intervention: got none"):
        plots.heatmap([])
    with pytest.raises(TypeError, match="got SteerVec, expected an ActivScalar"):
        plots.heatmap([scalars(), SteerVec(scalars().location)])


def test_a_file_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "heads.png"
    for _ in range(2):
        plots.heatmap(scalars(), path)
        assert path.read_bytes().startswith(PNG)
    assert [entry.name for entry in path.parent.iterdir()] == ["heads.png"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "heads.png"
    path.write_bytes(b"old")

    def fails(self: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.heatmap(scalars(), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.png"]


def test_pictures_do_not_touch_pyplot(tmp_path: Path) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    plots.heatmap(scalars(), tmp_path / "heads.svg")
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("intervention", "error", "message"),
    [
        (SteerVec(scalars().location), TypeError, "got SteerVec, expected an ActivScalar"),
        (ActivScalar.stack([scalars(), scalars()]), ValueError, "got a stack of 2"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_single_scalar_map_is_refused(intervention: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.heatmap(intervention)


@pytest.mark.parametrize("name", ["heads", "heads.docx"])
def test_an_unknown_suffix_is_refused_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a file that ends in \.png"):
        plots.heatmap(scalars(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_limit_must_be_positive() -> None:
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="limit: got"):
            plots.heatmap(scalars(), limit=limit)


def records(n: int) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 0.0, "effectiveness": 4.0 - step, "faithfulness": 0.1 * step, "minimality": 2.0 * step}
        | {"n_active": 9 - step}
        for step in range(n)
    ]


def test_the_history_shows_every_term_and_its_last_value(tmp_path: Path) -> None:
    figure = plots.history(records(3), tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(PNG)
    drawn = [list(axis.lines[0].get_ydata()) for axis in figure.axes]
    assert drawn == [[4.0, 3.0, 2.0], [0.0, 0.1, 0.2], [0.0, 2.0, 4.0], [9, 8, 7]]
    assert [axis.get_title(loc="right") for axis in figure.axes] == ["2", "0.2", "4", "7"]


def test_the_history_is_read_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "history.json"
    file.write_text(json.dumps(records(2)), encoding="utf-8")
    assert len(plots.history(file).axes) == 4
    file.write_text('[{"step": 1', encoding="utf-8")
    with pytest.raises(ValueError, match=r"history\.json: not JSON"):
        plots.history(file)
    with pytest.raises(FileNotFoundError):
        plots.history(tmp_path / "none.json")


@pytest.mark.parametrize(("steps", "message"), [([], "got no steps"), ([{"step": 0}], "expected a record with")])
def test_an_incomplete_history_is_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.history(steps)


def attributed(positions: tuple[int, ...] | None = None, site: str = "head", **fields: Any) -> Attribution:
    """A result of 3 layers with 4 heads: scores 1, 2, … and knock-outs of minus half of them."""
    location = scalars(positions=positions, site=site).location
    shape = (3, location.n_slots, location.n_heads)
    scores = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    return replace(Attribution(scores, -0.5 * scores, location, 5, -1.5), **fields)


def test_prediction_and_measurement_share_one_scale_and_the_title_states_their_agreement(tmp_path: Path) -> None:
    figure = plots.attribution(attributed(), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(PNG)
    predicted, measured, bar = figure.axes  # one bar for both
    assert [axis.get_title(loc="left")[:9] for axis in (predicted, measured)] == ["predicted", "measured"]
    assert bar.get_ylim() == (-12.0, 12.0)
    # Removing any of them lowers the difference: blue, and paler where less.
    strong, weak = (collections_of(axis)[1].get_facecolor()[-1] for axis in (predicted, measured))
    assert strong[2] > strong[0]
    assert weak[2] > weak[0]
    assert weak[0] > strong[0]
    line = figure.texts[1].get_text()
    assert line == "5 prompts  ·  z[c] − z[w] = −1.50  ·  Pearson 1.00  ·  Spearman 1.00  ·  3 of the 3 outlined shared"


def test_outlines_mark_the_largest_of_each_map() -> None:
    scores = torch.zeros(3, 1, 4)
    scores[0, 0, 1], scores[1, 0, 2], scores[2, 0, 3], scores[2, 0, 0] = 3.0, -2.0, 1.0, 0.1
    figure = plots.attribution(attributed(scores=scores))
    active = collections_of(figure.axes[0])[1]
    edges = {
        tuple(path.get_extents().get_points().mean(0).round().astype(int)): tuple(edge)
        for path, edge in zip(active.get_paths(), active.get_edgecolor(), strict=True)
    }
    assert len(edges) == 4
    faint = edges.pop((2, 0))
    assert faint not in set(edges.values())
    assert len(set(edges.values())) == 1


def test_an_attribution_without_knock_outs_or_by_positions_or_at_whole_sites_can_be_drawn() -> None:
    assert len(plots.attribution(attributed(knock_out=None)).axes) == 2
    titles = [axis.get_title(loc="left") for axis in plots.attribution(attributed(positions=(0, -1))).axes[:-1]]
    assert [title.split("  ·  ")[1] for title in titles] == ["position 0", "position -1"] * 2
    whole = plots.attribution(attributed(positions=(0, -1), site="mlp_out"))
    assert [label.get_text() for label in whole.axes[0].get_yticklabels()] == ["0", "-1"]
    assert whole.texts[0].get_text() == "Removing one layer's MLP output at a time"


def test_scores_of_an_objective_have_a_scale_of_their_own() -> None:
    figure = plots.attribution(attributed(objective=Objective()))
    _, objective, _, change = figure.axes
    assert (objective.get_title(), change.get_title()) == ("Δ objective", "Δ logits")
    assert (objective.get_ylim(), change.get_ylim()) == ((-12.0, 12.0), (-6.0, 6.0))
    assert "Pearson" not in figure.texts[1].get_text()


def test_what_is_no_attribution_is_refused() -> None:
    with pytest.raises(TypeError, match="result: got ActivScalar, expected an Attribution"):
        plots.attribution(scalars())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit: got -1"):
        plots.attribution(attributed(), limit=-1)


def run(*points: tuple[float, float, float]) -> list[PathPoint]:
    return [PathPoint(n, to_correct, to_wrong, kl=n / 100) for n, to_correct, to_wrong in points]


def test_one_path_has_both_directions_in_one_panel_by_the_number_of_active_scalars(tmp_path: Path) -> None:
    figure = plots.path({"heads": run((8, 0.9, 0.95), (0, 0.1, 0.8), (3, 0.5, 0.9))}, tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(PNG)
    (axis,) = figure.axes
    assert [list(line.get_xdata()) for line in axis.lines] == [[0, 3, 8]] * 2
    assert [list(line.get_ydata()) for line in axis.lines] == [[0.1, 0.5, 0.9], [0.8, 0.9, 0.95]]


def test_several_paths_have_a_panel_for_each_direction_and_one_for_kl() -> None:
    figure = plots.path({"heads": run((0, 0, 1), (9, 1, 1)), "sites": run((0, 0, 1), (5, 1, 1))}, kl=True)
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2]
    assert list(figure.axes[2].lines[1].get_ydata()) == [0.0, 0.05]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["heads", "sites"]


def test_runs_of_a_path_are_averaged_where_all_of_them_have_points() -> None:
    seeds = [run((0, 0.0, 1), (4, 0.4, 1), (8, 0.8, 1)), run((2, 0.4, 1), (6, 0.8, 1))]
    (axis,) = plots.path({"heads": seeds}).axes
    line, band = axis.lines[0], axis.collections[0].get_paths()[0].vertices
    assert list(line.get_xdata()) == [2, 4, 6]
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.5, 0.7])
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.2, 0.8))


def test_a_logarithmic_path_shows_zero_too() -> None:
    (axis,) = plots.path({"heads": run((0, 0, 1), (10, 0.5, 1), (1000, 1, 1))}, log=True).axes
    left, one, ten, hundred = axis.transData.transform([(x, 0) for x in (0, 1, 10, 100)])[:, 0]
    assert left < one < ten
    assert hundred - ten == pytest.approx(ten - one)


@pytest.mark.parametrize(
    ("curves", "options", "error", "message"),
    [
        ({}, {}, ValueError, "curves: got none"),
        ({"heads": []}, {}, ValueError, "curves: 'heads' has a run without points"),
        ({"heads": [run((0, 0, 1)), []]}, {}, ValueError, "curves: 'heads' has a run without points"),
        ({"heads": [(0, 1, 1)]}, {}, TypeError, "curves: got int, expected a PathPoint"),
        ({"heads": [PathPoint(0, 1, 1)]}, {"kl": True}, ValueError, "curves: 'heads' has points without kl"),
    ],
)
def test_paths_without_points_are_refused(curves: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.path(curves, **options)


def test_strengths_are_drawn_in_their_order_with_the_spread_of_their_seeds(tmp_path: Path) -> None:
    curves = {"a": ([1, -1, 0], [30.0, 10.0, 20.0]), "b": ([0, 1], [[1.0, 2.0], [3.0, 6.0]])}
    figure = plots.strengths(curves, tmp_path / "s.png", ylabel="perplexity", baseline=12.0)
    (axis,) = figure.axes
    assert list(axis.lines[0].get_xdata()) == [-1, 0, 1]
    assert list(axis.lines[0].get_ydata()) == [10, 20, 30]
    assert list(axis.lines[1].get_ydata()) == [2, 4]
    (band,) = axis.collections
    assert sorted(set(band.get_paths()[0].vertices[:, 1])) == [1, 2, 3, 6]
    assert [text.get_text() for text in axis.texts] == ["frozen model"]
    assert axis.get_yscale() == "linear"
    assert plots.strengths(curves, ylabel="perplexity", log=True).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curves: got none"),
        ({"a": ([0, 1], [1.0])}, "curves: 'a' has 2 strengths and values of shape"),
        ({"a": ([], [])}, "curves: 'a' has 0 strengths"),
        ({"a": ([0], [0.0])}, "curves: 'a' has values of 0 or less"),
    ],
)
def test_strengths_without_their_values_are_refused(curves: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.strengths(curves, ylabel="perplexity", log=True)


def test_a_comparison_shows_mean_least_and_largest_in_the_row_of_the_system(tmp_path: Path) -> None:
    rows = [
        Measured("heads", "flipped", (0.8, 1.0, 0.9)),
        Measured("vectors", "flipped", (0.5,)),
        Measured("vectors", "active", (0, 900)),
    ]
    figure = plots.comparison(rows, tmp_path / "c.png", log=["active"])
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    flipped, active = figure.axes
    assert [axis.get_title(loc="left") for axis in (flipped, active)] == ["flipped", "active"]
    assert [label.get_text() for label in flipped.get_yticklabels()] == ["heads", "vectors"]
    spread, mean = flipped.lines[:2]
    assert list(spread.get_xdata()) == [0.8, 1.0]
    assert list(mean.get_xdata()) == pytest.approx([0.9])
    assert list(mean.get_ydata()) == [0]
    assert [line.get_ydata()[0] for line in active.lines] == [1, 1]
    assert active.get_xscale() == "symlog"  # it has a 0
    assert not figure.legends


def test_groups_of_a_comparison_share_a_row_and_are_told_apart() -> None:
    rows = [Measured("heads", "flipped", (value,), group) for value, group in ((0.9, "training"), (0.8, "held out"))]
    figure = plots.comparison(rows)
    above, below = figure.axes[0].lines[1::2]
    assert -0.5 < above.get_ydata()[0] < 0 < below.get_ydata()[0] < 0.5
    assert above.get_marker() != below.get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "held out"]


@pytest.mark.parametrize(
    ("rows", "log", "message"),
    [
        ([], (), "rows: got none"),
        ([Measured("a", "m", ())], (), "rows: 'a', 'm' has the values"),
        ([Measured("a", "m", (math.nan,))], (), "expected finite ones"),
        ([Measured("a", "m", (1.0,))], ["n"], r"log: got \['n'\], expected some of \['m'\]"),
        ([Measured("a", "m", (-1.0,))], ["m"], "log: 'm' has values below 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows: Any, log: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.comparison(rows, log=log)


def test_an_overlap_shows_every_number_and_darker_cells_for_more(tmp_path: Path) -> None:
    matrix = torch.tensor([[1.0, 0.25], [0.25, math.nan]])
    figure = plots.overlap(matrix, ["seed 0", "seed 1"], tmp_path / "o.png", title="Seeds")
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["1.00", "0.25", "0.25", "–"]
    full, quarter = (sum(axis.patches[i].get_facecolor()[:3]) for i in (0, 1))
    assert full < quarter
    assert [label.get_text() for label in axis.get_yticklabels()] == ["seed 0", "seed 1"]
    assert figure.texts[0].get_text() == "Seeds"


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0]], r"matrix: got shape \(1, 1\) for 2 labels"),
        ([[1.0, 2.0], [2.0, 1.0]], "matrix: got values outside 0 to 1"),
    ],
)
def test_what_is_no_overlap_is_refused(matrix: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.overlap(matrix, ["a", "b"])
