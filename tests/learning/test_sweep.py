"""A sweep is its single fits: the same results, shared passes, and a folder that survives whatever happens."""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts
from sweep_cases import OBJECTIVE, SETTINGS, run_sweep
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning.engine import Engine
from actscale_fast.learning.fit_state import FitState


def single(
    objective: af.Objective = OBJECTIVE, examples: Any = None, start: Any = None, **options: Any
) -> af.FitResult:
    model = tiny.llama()
    start = start or af.ActivScalar.for_model(model)
    return af.fit(model, tiny.tokenizer(), examples or conflicts(7), start, objective, **SETTINGS | options)


def assert_same_fit(fit: af.SweepFit, alone: af.FitResult) -> None:
    torch.testing.assert_close(values(fit.intervention), values(alone.intervention), rtol=1e-3, atol=2e-5)
    for record, expected in zip(fit.history, alone.history, strict=True):
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-5)


def flat(evaluation: af.Evaluation) -> dict[str, float]:
    told = evaluation.to_dict()
    told |= {f"baseline {name}": value for name, value in told.pop("baseline").items() if value is not None}
    for name in ("intervals", "baseline intervals"):
        ends = told.pop(name)
        told |= {f"{name} {key} {index}": end for key, pair in ends.items() for index, end in enumerate(pair)}
    return told


def values(intervention: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in intervention.parameters()])


def test_a_sweep_is_its_single_fits() -> None:
    grid = {"minimality": [0.05, 0.3], "faithfulness": [0.2, 1.0], "margin": [1.0, 3.0], "seed": [1, 2]}
    result = run_sweep(grid)
    assert len(result.fits) == 16
    for fit in result.fits:
        objective = af.Objective(*(fit.chosen[name] for name in ("margin", "faithfulness", "minimality")))
        assert_same_fit(fit, single(objective, seed=fit.chosen["seed"]))
    assert len({tuple(values(fit.intervention).tolist()) for fit in result.fits}) == 16


def test_points_may_differ_in_steps_batches_rates_and_directions() -> None:
    grid = [
        {"steps": 3, "lr": 0.1},
        {"batch_size": 2, "schedule": "linear"},
        {"directions": (1,)},
        {"kl": "reverse"},
        {"exclude_answers": False, "betas": (0.8, 0.9)},
    ]
    for fit, point in zip(run_sweep(grid).fits, grid, strict=True):
        mine = {name: value for name, value in point.items() if name in ("directions", "kl", "exclude_answers")}
        objective = af.Objective(margin=2.0, faithfulness=0.7, minimality=0.1, **mine)  # type: ignore[arg-type]
        assert_same_fit(fit, single(objective, **{name: value for name, value in point.items() if name not in mine}))
        assert len(fit.history) == point.get("steps", 6)


def test_layer_ranges_share_a_batch_where_they_begin_alike() -> None:
    ranges = [[0, 1, 2], [0], [2, 1], [1, 2], [2]]
    result = run_sweep({"layers": ranges})
    for fit, layers in zip(result.fits, ranges, strict=True):
        assert fit.intervention.location.layers == tuple(layers)
        assert_same_fit(fit, single(start=af.ActivScalar.for_model(tiny.llama(), layers=layers)))


def test_tasks_are_sets_of_examples_by_name() -> None:
    sets = {"many": conflicts(7), "few": conflicts(3, seed=5)}
    result = run_sweep({"seed": [0, 1]}, examples=sets)
    assert [(fit.task, fit.chosen["seed"]) for fit in result.fits] == [("many", 0), ("few", 0), ("many", 1), ("few", 1)]
    for fit in result.fits:
        assert_same_fit(fit, single(examples=sets[fit.task or ""], seed=fit.chosen["seed"]))
    only = run_sweep({"task": ["few"]}, examples=sets).fits
    assert [fit.task for fit in only] == ["few"]


def test_interventions_of_several_kinds_are_starting_points_and_stay_as_they_are() -> None:
    model = tiny.llama()
    starts = [
        af.ActivScalar.for_model(model),
        af.ActivScalar.for_model(model, site="residual", positions=[-1]),
        af.SteerVec.for_model(model, site="attn_out", layers=[1]),
    ]
    with torch.no_grad():
        starts[0].alpha.fill_(0.1)  # type: ignore[union-attr]
    before = [values(start).clone() for start in starts]
    for fit, start, was in zip(run_sweep(starts, model).fits, starts, before, strict=True):
        assert torch.equal(values(start), was)
        assert type(fit.intervention) is type(start)
        assert_same_fit(fit, single(start=start))
        with torch.no_grad():
            start.load_state_dict({name: torch.zeros_like(value) for name, value in start.state_dict().items()})


@pytest.mark.parametrize(
    ("kind", "shares"), [("ActivScalar", {"minimality": "30%"}), ("ActivScalar", {}), ("SteerVec", {"lr": "5%"})]
)
def test_interventions_at_two_modules_of_one_site_are_fitted_each_at_its_own(kind: str, shares: dict[str, str]) -> None:
    model, examples = tiny.llama(), conflicts(7)
    named = ("mlp", "self_attn.o_proj")
    starts = [getattr(af, kind).for_model(model, site="mlp_out", mlp=path) for path in named]
    settings = {**SETTINGS, **({"lr": shares["lr"]} if "lr" in shares else {})}
    objective = replace(OBJECTIVE, minimality=shares.get("minimality", OBJECTIVE.minimality))
    found = af.sweep(model, tiny.tokenizer(), examples, starts, objective, **settings).fits
    for fit, path in zip(found, named, strict=True):
        own = getattr(af, kind).for_model(model, site="mlp_out", mlp=path)
        alone = af.fit(model, tiny.tokenizer(), examples, own, objective, **settings).intervention
        assert fit.intervention.paths == {"mlp": path}
        torch.testing.assert_close(values(fit.intervention), values(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*(values(fit.intervention) for fit in found), atol=1e-2)


def test_all_fits_of_a_step_share_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[int] = []
    gradients = Engine.gradients

    def counted(self: Engine, asked: Any) -> Any:
        requests.append(len(asked))
        return gradients(self, asked)

    monkeypatch.setattr(Engine, "gradients", counted)
    run_sweep({"seed": range(4)})
    assert requests == [4] * 6
    requests.clear()
    result = run_sweep({"seed": range(4)}, at_once=2)
    assert requests == [2] * 12
    for fit in result.fits:
        assert_same_fit(fit, single(seed=fit.chosen["seed"]))


def test_a_fit_that_stops_early_gives_its_place_to_the_next() -> None:
    grid = [{"minimality": 1e4}, {"seed": 1}, {"seed": 2}]
    result = run_sweep(grid, at_once=1, tolerance=0.0, patience=2)
    assert [len(fit.history) for fit in result.fits] == [2, 6, 6]
    assert result.fits[0].n_active == 0
    assert_same_fit(result.fits[2], single(seed=2))


def test_a_path_starts_each_fit_where_the_one_of_larger_minimality_ended() -> None:
    path = [0.05, 0.4, 0.15]
    result = run_sweep({"minimality": path}, warm_start=True)
    start = af.ActivScalar.for_model(tiny.llama())
    for minimality in sorted(path, reverse=True):
        alone = single(af.Objective(margin=2.0, faithfulness=0.7, minimality=minimality), start=start)
        assert_same_fit(result.fits[path.index(minimality)], alone)
    assert [fit.chosen["minimality"] for fit in result.fits] == path


def test_a_finished_fit_is_not_repeated_and_the_grid_may_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_sweep({"seed": [0, 1]}, folder=tmp_path)
    begun: list[str] = []
    make = FitState.__init__

    def noted(self: FitState, *args: Any, **kwargs: Any) -> None:
        begun.append(kwargs["name"])
        make(self, *args, **kwargs)

    monkeypatch.setattr(FitState, "__init__", noted)
    again = run_sweep({"seed": [2, 1, 0]}, folder=tmp_path)
    assert begun == ["seed=2"]
    for fit, before in zip(again.fits[:0:-1], first.fits, strict=True):
        assert torch.equal(values(fit.intervention), values(before.intervention))
        assert fit.history == before.history
    assert len([place for place in tmp_path.iterdir() if place.is_dir()]) == 3
    assert not list(tmp_path.rglob("state.safetensors"))
    read = af.load_sweep(tmp_path)
    assert [fit.label for fit in read.fits] == ["seed=2", "seed=1", "seed=0"]
    assert torch.equal(values(read.fits[1].intervention), values(first.fits[1].intervention))


@pytest.mark.parametrize("warm_start", [False, True])
def test_an_interrupted_sweep_goes_on_to_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_start: bool
) -> None:
    grid = {"minimality": [0.3, 0.1], "seed": [0, 1]}
    whole = run_sweep(grid, warm_start=warm_start)
    update, calls = ops.proximal_adam_, 0

    def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        update(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(ops, "proximal_adam_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(grid, folder=tmp_path, warm_start=warm_start, checkpoint_every=2)
    resumed = run_sweep(grid, folder=tmp_path, warm_start=warm_start, checkpoint_every=2)
    for fit, expected in zip(resumed.fits, whole.fits, strict=True):
        torch.testing.assert_close(values(fit.intervention), values(expected.intervention), rtol=1e-3, atol=2e-5)
        assert [record["step"] for record in fit.history] == list(range(6))


def test_a_fit_that_is_no_longer_finite_leaves_the_others_alone() -> None:
    with torch.no_grad():
        broken = af.ActivScalar.for_model(tiny.llama())
        broken.alpha.fill_(3e38)
    fine = af.ActivScalar.for_model(tiny.llama())
    with pytest.warns(UserWarning, match="start=0: step 0: .*the other fits continue"):
        result = run_sweep([broken, fine])
    assert result.fits[0].error is not None
    assert "step 0" in result.fits[0].error
    assert_same_fit(result.fits[1], single())
    assert result.pareto() == [result.fits[1]]


def test_what_a_failed_fit_had_come_to_is_kept_and_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = FitState.update

    def breaks(self: FitState, terms: Tensor, gradients: Any) -> None:
        if self.name == "minimality=0.3" and self.taken == 3:
            terms = terms * torch.nan
        update(self, terms, gradients)

    grid = {"minimality": [0.3, 0.1]}
    with monkeypatch.context() as context:
        context.setattr(FitState, "update", breaks)
        with pytest.warns(UserWarning, match="step 3: the effectiveness term is nan"):
            first = run_sweep(grid, folder=tmp_path, warm_start=True)
    assert "step 3" in (first.fits[0].error or "")
    assert (first.fits[1].error or "").startswith("not begun: ")
    read = af.load_sweep(tmp_path)
    assert [fit.error for fit in read.fits] == [fit.error for fit in first.fits]
    assert torch.equal(values(read.fits[0].intervention), values(first.fits[0].intervention))
    assert [len(fit.history) for fit in read.fits] == [3, 0]
    again = run_sweep(grid, folder=tmp_path, warm_start=True)
    assert [fit.error for fit in again.fits] == [None, None]
    with pytest.raises(ValueError, match="by: got 'flip', expected one of flips, effectiveness"):
        again.fits[0].score("flip")  # type: ignore[arg-type]


def test_held_out_examples_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, test = {"minimality": [0.3, 0.05]}, conflicts(5, seed=9)
    first = run_sweep(grid, evaluate_on=test, folder=tmp_path)
    for fit in first.fits:
        alone = af.evaluate(tiny.llama(), tiny.tokenizer(), test, fit.intervention)
        assert fit.evaluation is not None
        assert flat(fit.evaluation) == pytest.approx(flat(alone), rel=1e-4, abs=1e-6)
    module = importlib.import_module("actscale_fast.learning.sweep.sweep")  # `sweep` is also a function
    monkeypatch.setattr(module, "evaluate_all", None)
    again = run_sweep(grid, evaluate_on=test, folder=tmp_path)
    assert [fit.evaluation for fit in again.fits] == [fit.evaluation for fit in first.fits]
    assert [fit.evaluation for fit in af.load_sweep(tmp_path).fits] == [fit.evaluation for fit in first.fits]


def test_the_front_holds_what_no_other_fit_beats() -> None:
    result = run_sweep({"minimality": [0.0, 0.02, 0.1, 0.3, 1.0], "seed": [0, 1]}, evaluate_on=conflicts(6, seed=2))
    front = result.pareto()
    assert front
    for fit in result.fits:
        beaten = any(
            (other.n_active <= fit.n_active and other.score("flips") > fit.score("flips"))
            or (other.n_active < fit.n_active and other.score("flips") >= fit.score("flips"))
            for other in result.fits
        )
        assert beaten or any(
            (other.n_active, other.score("flips")) == (fit.n_active, fit.score("flips")) for other in front
        )
    active = [fit.n_active for fit in front]
    scores = [fit.score("flips") for fit in front]
    assert active == sorted(set(active))
    assert scores == sorted(set(scores))


def test_the_callers_model_and_template_are_left_as_they_were() -> None:
    model = tiny.llama().train()
    template = af.ActivScalar.for_model(model, layers=[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_sweep({"seed": [0]}, model, intervention=template)
    assert model.training
    assert not template.alpha.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.model.layers[0].__dict__


def test_fits_with_another_accumulation_are_other_fits(tmp_path: Path) -> None:
    for accumulate, finished in ((1, 1), (2, 2), (1, 2)):
        run_sweep({"seed": [0]}, folder=tmp_path, accumulate=accumulate)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == finished


def test_a_folder_without_a_fit_of_this_grid_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="actscale_fast")
    run_sweep({"seed": [0, 1]}, folder=tmp_path, steps=1)
    run_sweep({"seed": [1, 2]}, folder=tmp_path, steps=1)
    assert not caplog.messages
    run_sweep({"seed": [0, 1]}, folder=tmp_path, steps=2)
    (told,) = caplog.messages
    assert f"{tmp_path} holds 3 finished fits, such as seed=0-" in told
    assert "none of them belongs to this grid; they are kept, and all 2 points are fitted" in told


def test_a_damaged_fit_is_refused_by_its_folder(tmp_path: Path) -> None:
    run_sweep({"seed": [0]}, folder=tmp_path)
    (place,) = (place for place in tmp_path.iterdir() if place.is_dir())
    (place / "history.json").write_text("[")
    with pytest.raises(ValueError, match=r"folder: .*seed=0.* is damaged .*delete it"):
        run_sweep({"seed": [0]}, folder=tmp_path)
    (place / "summary.json").unlink()
    assert len(run_sweep({"seed": [0]}, folder=tmp_path).fits[0].history) == 6
    assert json.loads((tmp_path / "sweep.json").read_text())[0]["label"] == "seed=0"


@pytest.mark.parametrize(
    ("grid", "options", "error", "message"),
    [
        ({"lambda": [1]}, {}, ValueError, "grid: got 'lambda', expected among margin, faithfulness"),
        ({"margin": 3.0}, {}, TypeError, "grid: got margin=3.0, expected a list of values"),
        ({"schedule": "cosine"}, {}, TypeError, "grid: got schedule='cosine', expected a list"),
        ({"margin": [-1]}, {}, ValueError, "margin: got -1"),
        ({"layers": [[7]]}, {}, ValueError, "layers: got 7, expected -3 to 2"),
        ({"task": ["other"]}, {}, ValueError, "grid: got the task 'other'"),
        ([], {}, ValueError, "grid: got no points"),
        (3, {}, TypeError, "grid: got int, expected a dict of lists"),
        ({"seed": [0]}, {"at_once": 0}, ValueError, "at_once: got 0"),
        ({"seed": [0]}, {"evaluate_on": {"a": []}}, ValueError, r"evaluate_on\['a'\]: got none, expected at least one"),
        ({"seed": [0]}, {"evaluate_on": {"a": conflicts(2)}}, ValueError, "evaluate_on: got the sets"),
        ({"seed": [0]}, {"evaluate_on": 3}, TypeError, "evaluate_on: got int, expected examples"),
        (
            {"seed": [0]},
            {"evaluate_on": [af.Example("A", " B C", " B")]},
            ValueError,
            "row 1 of evaluate_on: the tokens of correct ' B C'",
        ),
        ({"seed": [0]}, {"memory_bytes": -1}, ValueError, "memory_bytes: got -1, expected an integer"),
    ],
)
def test_bad_grids_are_refused_by_name(grid: Any, options: Any, error: type[Exception], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            run_sweep(grid, **options)


def test_a_path_begins_where_no_scalar_leaves_zero() -> None:
    model, examples = tiny.llama(), conflicts(7)
    objective = af.Objective(margin=2.0, faithfulness=0.7)
    path = af.minimality_path(model, tiny.tokenizer(), examples, 5, smallest=0.1, objective=objective)
    assert path == pytest.approx([path[0] * 0.1 ** (i / 4) for i in range(5)])
    for factor, stays in ((1.001, True), (0.98, False)):
        scalars = af.ActivScalar.for_model(model)
        fitted = af.Objective(margin=2.0, faithfulness=0.7, minimality=path[0] * factor)
        af.fit(model, tiny.tokenizer(), examples, scalars, fitted, steps=1, batch_size=7, progress=False)
        assert (scalars.n_active == 0) is stays
    with pytest.raises(ValueError, match="smallest: got 2, expected a number between 0 and 1"):
        af.minimality_path(model, tiny.tokenizer(), examples, smallest=2)


def test_the_front_is_drawn_with_every_fit(tmp_path: Path) -> None:
    result = run_sweep({"minimality": [0.0, 0.05, 0.3], "seed": [0, 1]})
    figure = result.plot(tmp_path / "front.png", title="A sweep")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    axis = figure.axes[0]
    drawn = {tuple(point) for points in axis.collections for point in points.get_offsets().tolist()}
    assert drawn == {(fit.n_active, fit.score("effectiveness")) for fit in result.fits}
    assert axis.get_title("left") == "A sweep"
    with pytest.raises(ValueError, match=r"by: got 'flips', but .* was not evaluated"):
        af.plots.pareto(result, by="flips")
