"""λ_M as a share of λ_max: the number it stands for, against a plain gradient in float64, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import full
from fit_cases import OBJECTIVE, conflicts, interrupted_at, run

import actscale_fast as af
from actscale_fast.learning.encoded_examples import EncodedExamples


def largest(intervention: af.interventions.Intervention, examples: list[af.Example], objective: af.Objective) -> float:
    """max |dE/dp| at 0 over all examples, from one float64 pass per prompt and direction."""
    model = tiny.llama(dtype=torch.float64)
    data = EncodedExamples(examples, tiny.tokenizer(), model)
    at_zero = type(intervention)(intervention.location)
    alone = replace(objective, minimality=0.0, faithfulness=0.0)
    return max(float(gradient.abs().max()) for gradient in full(model, data, at_zero, alone)[1])


@pytest.mark.parametrize("kind", ["ActivScalar", "SteerVec", "DynScalar"])
@pytest.mark.parametrize("directions", [(1, -1), (1,)])
def test_a_share_is_that_of_the_largest_gradient_at_0(kind: str, directions: tuple[int, ...]) -> None:
    model, examples = tiny.llama(), conflicts(7)
    objective = replace(OBJECTIVE, minimality="25%", directions=directions)
    intervention = getattr(af, kind).for_model(model)
    with torch.no_grad():  # λ_max does not depend on where the fit starts
        for value in intervention.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    found = run(model, examples, objective, intervention=intervention, steps=1)
    assert found.objective is not None
    assert found.objective.minimality == pytest.approx(0.25 * largest(intervention, examples, objective), rel=1e-3)
    numbers = getattr(af, kind).for_model(model)
    with torch.no_grad():
        for value in numbers.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    same = run(model, examples, found.objective, intervention=numbers, steps=1)
    assert all(map(torch.equal, intervention.parameters(), numbers.parameters()))
    assert same.history == found.history
    assert same.objective == found.objective


def test_nothing_leaves_0_at_100_percent_and_something_does_below() -> None:
    for share, moves in (("100%", False), ("97%", True), ("0%", True)):
        found = run(tiny.llama(), conflicts(7), replace(OBJECTIVE, minimality=share), batch_size=7, steps=1)
        assert (found.intervention.n_active > 0) is moves


def test_a_share_means_the_same_on_a_model_with_ten_times_larger_logits() -> None:
    found = {}
    for factor in (1.0, 10.0):
        model = tiny.llama()
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        objective = af.Objective(margin=2.0 * factor, faithfulness=0.0, minimality="20%")
        found[factor] = run(model, conflicts(9), objective, steps=12, batch_size=9)
    one, ten = found[1.0], found[10.0]
    assert ten.objective.minimality == pytest.approx(10 * one.objective.minimality, rel=1e-3)
    assert 0 < one.intervention.n_active == ten.intervention.n_active < 12
    torch.testing.assert_close(one.intervention.alpha, ten.intervention.alpha, rtol=2e-2, atol=1e-3)


def test_a_resumed_fit_keeps_its_number(tmp_path: Path) -> None:
    objective, path = replace(OBJECTIVE, minimality="15%"), tmp_path / "fit.safetensors"
    whole = run(tiny.llama(), conflicts(9), objective)
    with interrupted_at(3):
        run(tiny.llama(), conflicts(9), objective, checkpoint=path)
    for _ in range(2):  # then from the checkpoint of the finished fit, without a pass
        resumed = run(tiny.llama(), conflicts(9), objective, checkpoint=path)
        assert torch.equal(resumed.intervention.alpha, whole.intervention.alpha)
        assert resumed.objective == whole.objective
        assert resumed.history == whole.history
    with pytest.raises(ValueError, match="belongs to another fit: objective"):
        run(tiny.llama(), conflicts(9), replace(OBJECTIVE, minimality="16%"), checkpoint=path)


def test_a_sweeps_shares_are_those_of_single_fits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 4, "progress": False}
    examples, model = conflicts(7), tiny.llama()
    grid = {"minimality": ["50%", 0.1, "20%"], "margin": [2.0, 4.0]}
    result = af.sweep(model, tiny.tokenizer(), examples, grid, OBJECTIVE, folder=tmp_path, **settings)
    for fit in result.fits:
        objective = replace(OBJECTIVE, minimality=fit.chosen["minimality"], margin=fit.chosen["margin"])
        scalars = af.ActivScalar.for_model(model)
        alone = af.fit(model, tiny.tokenizer(), examples, scalars, objective, **settings)
        assert fit.settings["minimality"] == pytest.approx(alone.objective.minimality, rel=1e-3)
        torch.testing.assert_close(fit.intervention.alpha, scalars.alpha, rtol=1e-3, atol=2e-5)
    again = af.sweep(model, tiny.tokenizer(), examples, grid, OBJECTIVE, folder=tmp_path, **settings)
    assert [fit.settings for fit in again.fits] == [fit.settings for fit in result.fits]
    path = af.sweep(
        model, tiny.tokenizer(), examples, {"minimality": ["20%", "80%"]}, OBJECTIVE, warm_start=True, **settings
    )
    assert [fit.n_active for fit in path.fits] == sorted((fit.n_active for fit in path.fits), reverse=True)


def test_shares_that_mean_nothing_are_refused() -> None:
    for text in ("110%", "abc%", "-5%", "10", "%", "nan%", "1e400%"):
        with pytest.raises(
            ValueError, match=rf"minimality: got '{text}', expected .* a share of λ_max from '0%' to '100%'"
        ):
            af.Objective(minimality=text)
    with pytest.raises(ValueError, match="minimality: got -1, expected a finite number >= 0, or a share"):
        af.Objective(minimality=-1)
    with pytest.raises(ValueError, match="minimality: got '10%' with sparsity='scalars', which makes no parameter"):
        af.Objective(minimality="10%", sparsity="scalars")
    assert af.Objective(minimality=" 12.5 % ") == af.Objective(minimality="12.5%")
    assert af.Objective(minimality="12.5%").minimality_share == 0.125
    with pytest.raises(ValueError, match="got the share '5%', expected a number here"):
        _ = af.Objective(minimality="5%").minimality_weight


def test_a_share_of_nothing_names_the_cause() -> None:
    model, objective = tiny.llama(), replace(OBJECTIVE, minimality="10%")
    early = af.ActivScalar.for_model(model, layers=[-1], positions=[0])
    with pytest.raises(ValueError, match=r"the gradient is exactly 0 .* the last layer"):
        run(model, conflicts(6), objective, intervention=early)
    with pytest.raises(ValueError, match="grid: minimality=10%: intervention: the gradient is exactly 0"):
        af.sweep(model, tiny.tokenizer(), conflicts(6), {"minimality": ["10%"]}, intervention=early, progress=False)
