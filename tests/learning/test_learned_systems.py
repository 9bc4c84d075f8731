"""The learned systems on the real model: a few steps bring the answers nearer, in both directions."""

from __future__ import annotations

from typing import Any

import pytest

import actscale_fast as af

pytestmark = pytest.mark.usefixtures("unchecked_fits")


@pytest.mark.real_model
@pytest.mark.parametrize("system", ["SteerVec", "DynScalar", "ActivScalar by site and position"])
def test_a_few_steps_flip_answers_towards_both_sides(system: str, demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    train, _ = af.tasks.indirect_object_identification(tokenizer, n_train=6, n_test=1, aligned=True)
    options: dict[str, Any] = {"steps": 6, "schedule": "constant", "progress": False}
    intervention: af.Intervention
    if system == "ActivScalar by site and position":
        positions = range(len(tokenizer(train[0].prompt)["input_ids"]))
        sites = [af.ActivScalar.for_model(model, site=s, positions=positions) for s in ("attn_out", "mlp_out")]
        intervention, options["lr"] = sites[0] + sites[1], 0.05
    else:
        intervention, options["lr"] = getattr(af, system).for_model(model), 0.01
    result = af.fit(model, tokenizer, train, intervention, af.Objective(minimality=0.0, faithfulness=0.1), **options)
    assert result.history[-1]["effectiveness"] < 0.7 * result.history[0]["effectiveness"]
    evaluation = af.evaluate(model, tokenizer, train, intervention)
    assert evaluation.logit_difference > 0
    assert evaluation.logit_difference_inverted < evaluation.logit_difference - 3
