"""Numbers of any kind mean what they say, and the largest weight of a path keeps every scalar at 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from op_cases import Backend, Inputs, error_of, over

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning.fit_settings import FitSettings

pytestmark = pytest.mark.usefixtures("unchecked_fits")

EXAMPLES = [
    af.Example(f"{start} {middle} is", f" {correct}", f" {wrong}")
    for start, middle in (("The capital of A", ""), ("Q what is B", "answer"), ("in one", "two three"))
    for correct, wrong in (("Paris", "Rome"), ("Oslo", "Berlin"))
]


@pytest.mark.parametrize("one", [1, np.float32(1), np.int64(1), np.float16(1)])
def test_integers_and_numpy_scalars_are_the_floats_that_they_equal(one: Any) -> None:
    objective = af.Objective(margin=4 * one, faithfulness=one, minimality=0 * one)
    assert objective == af.Objective(margin=4.0, faithfulness=1.0, minimality=0.0)
    assert {type(v) for v in (objective.margin, objective.faithfulness, objective.minimality)} == {float}
    settings = FitSettings(lr=one, betas=(0 * one, 0 * one), tolerance=0 * one)
    assert settings == FitSettings(lr=1.0, betas=(0.0, 0.0), tolerance=0.0)
    assert {type(value) for value in (settings.lr, settings.tolerance, *settings.betas)} == {float}


@pytest.mark.parametrize("bad", [True, np.True_, "1", None, float("nan"), float("inf"), 10**400, 1j, torch.tensor(1.0)])
def test_what_is_no_finite_number_is_refused_by_name(bad: Any) -> None:
    for name in ("margin", "faithfulness", "minimality"):
        assert error_of(lambda name=name: af.Objective(**{name: bad}), ValueError).startswith(f"{name}: got ")
    assert error_of(lambda: FitSettings(lr=bad), ValueError).startswith("lr: got ")
    assert error_of(lambda: FitSettings(betas=(bad, 0.9)), ValueError).startswith("betas: got ")
    if bad is not None:
        assert error_of(lambda: FitSettings(tolerance=bad), ValueError).startswith("tolerance: got ")


def test_a_fit_of_integer_weights_is_the_fit_of_the_floats() -> None:
    results = []
    for number in (int, float, np.float64):
        scalars = af.ActivScalar.for_model(tiny.llama())
        objective = af.Objective(margin=number(4), faithfulness=number(1), minimality=number(0))
        result = af.fit(
            tiny.llama(), tiny.tokenizer(), EXAMPLES, scalars, objective, steps=3, lr=number(1), betas=(number(0), 0.9),
            progress=False,
        )  # fmt: skip
        results.append(result.history)
    assert results[0] == results[1] == results[2]


def test_a_sweep_takes_integer_and_numpy_points() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    for values in ([0, 10_000], np.array([0.0, 10_000.0], dtype=np.float32)):
        found = af.sweep(model, tokens, EXAMPLES, {"minimality": values, "margin": [1]}, steps=2, progress=False)
        assert [fit.n_active > 0 for fit in found.fits] == [True, False]


@over()
def test_the_ops_take_integers_for_floats(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 40).to(backend.device)
    x, alpha = inputs.normal(2, 3, 2, 4).to(backend.device), inputs.normal(1, 1, 2).to(backend.device)
    weight = inputs.normal(40, 8).to(backend.device)
    hidden, other = inputs.normal(3, 8).to(backend.device), inputs.normal(3, 8).to(backend.device)

    def results(number: Any) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (rows.logits, x, hidden)]
        logits, activations, states = leaves
        statistics = ops.reference_statistics(
            other, weight, rows.correct, rows.wrong, softcap=number(30), logit_scale=number(1)
        )
        made = [
            ops.scale_heads(activations, alpha, strength=number(2)),
            ops.dynamic_scale(activations, inputs_weight, strength=number(2)),
            *ops.intervention_loss(
                logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, margin=number(4)
            ),
            ops.kl_div_from_logits(
                logits, rows.reference, temperature=number(2), softcap=number(30), row_weight=number(3)
            ),
            ops.linear_kl_div(
                states, weight, other, temperature=number(2), softcap=number(30), logit_scale=number(1)
            ),
            *ops.linear_intervention_loss(
                states, weight, statistics, rows.correct, rows.wrong, direction=rows.direction, margin=number(4),
                softcap=number(30), logit_scale=number(1),
            ),
        ]  # fmt: skip
        return [*made, *torch.autograd.grad([t.sum() for t in made], leaves)]

    inputs_weight = inputs.normal(2, 4).to(backend.device)
    exact = results(float)
    for number in (int, np.float32, np.int64):
        for found, expected in zip(results(number), exact, strict=True):
            assert torch.equal(found, expected)


def test_the_ops_refuse_a_bool_for_a_number() -> None:
    x = torch.zeros(2, 3)
    assert "temperature: got bool" in error_of(lambda: ops.kl_div_from_logits(x, x, temperature=True), TypeError)
    assert "strength: got bool" in error_of(
        lambda: ops.scale_heads(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1), strength=True), TypeError
    )


@pytest.mark.parametrize("batch_size", [2, 4, 100])
@pytest.mark.parametrize("kind", ["ActivScalar", "SteerVec"])
def test_the_largest_weight_of_a_path_keeps_every_scalar_at_0_and_a_smaller_one_does_not(
    kind: str, batch_size: int
) -> None:
    tokens, active = tiny.tokenizer(), []
    for seed in range(3):
        model = tiny.llama(seed)
        options: dict[str, Any] = {"steps": 8, "batch_size": batch_size, "seed": seed}
        template = getattr(af, kind).for_model(model)
        largest = af.minimality_path(model, tokens, EXAMPLES, 3, intervention=template, **options)[0]
        for share in (1.0, 0.98):
            intervention = getattr(af, kind).for_model(model)
            result = af.fit(
                model, tokens, EXAMPLES, intervention, af.Objective(minimality=share * largest), lr=0.05,
                schedule="constant", progress=False, **options,
            )  # fmt: skip
            most = max(record["n_active"] for record in result.history)
            if share == 1.0:
                assert most == 0
                swept = af.sweep(
                    model, tokens, EXAMPLES, {"minimality": [largest, largest * 2]}, intervention=template,
                    progress=False, **options,
                )  # fmt: skip
                assert [fit.n_active for fit in swept.fits] == [0, 0]
            else:
                active.append(most)
    assert sum(most > 0 for most in active) == len(active)
