"""The defaults of a fit mean the same on a model that computes the same function with ten times larger activations."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts

import actscale_fast as af


def enlarged(factor: float) -> Any:
    """The tiny model with activations at the head site that are `factor` times as large, and the same logits."""
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.div_(factor)
    return model


def by_defaults(model: Any, kind: str, **options: Any) -> af.FitResult:
    intervention = getattr(af, kind).for_model(model)
    return af.fit(model, tiny.tokenizer(), conflicts(20), intervention, steps=10, progress=False, **options)


@pytest.mark.parametrize(("kind", "power"), [("ActivScalar", 0), ("SteerVec", 1), ("DynScalar", -1)])
def test_defaults_hold_for_ten_times_larger_activations(kind: str, power: int) -> None:
    one, ten = by_defaults(enlarged(1.0), kind), by_defaults(enlarged(10.0), kind)
    for first, second in zip(one.intervention.parameters(), ten.intervention.parameters(), strict=True):
        print(first.abs().max(), (second / 10.0**power - first).abs().max(), first.count_nonzero(), first.numel())
        torch.testing.assert_close(second / 10.0**power, first, rtol=1e-3, atol=1e-4 * float(first.abs().max()))
    print(one.history[-1], ten.history[-1], one.objective, ten.objective)
