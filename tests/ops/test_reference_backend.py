"""The reference's own backend module: the gradients by formulas are those of autograd through the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import Inputs

from actscale_fast.ops import reference, reference_backend
from actscale_fast.ops.interface import LossArguments


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("positions", [1, 3])
def test_scaling_has_the_gradients_of_the_reference(inputs: Inputs, grouped: bool, positions: int) -> None:
    groups = 2 if grouped else 1
    x, alpha, shift = (
        inputs.normal(4, 3, 5, 6),
        inputs.normal(groups, positions, 5),
        inputs.normal(groups, positions, 5, 6),
    )
    row_strength = inputs.normal(4)
    group = torch.tensor([0, 1, 1, 0]) if grouped else None
    rest: tuple[Any, ...] = (0.7, row_strength, group)
    leaves = [value.requires_grad_() for value in (x, alpha, shift)]
    y = reference.scale_heads(x, alpha, shift, *rest)
    dy = inputs.normal(*y.shape)
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        assert torch.equal(reference_backend.scale_heads(x, alpha, shift, *rest), y)
        got = reference_backend.scale_heads_backward(dy, x, alpha, shift, *rest, True, True, True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("biased", [False, True])
def test_scaling_by_a_probe_has_the_gradients_of_the_reference(inputs: Inputs, biased: bool) -> None:
    x, weight = inputs.normal(4, 3, 5, 6).requires_grad_(), inputs.normal(2, 5, 6).requires_grad_()
    bias = inputs.normal(2, 5).requires_grad_() if biased else None
    rest: tuple[Any, ...] = (0.7, inputs.normal(4), torch.tensor([0, 1, 1, 0]))
    y, scalars = reference.dynamic_scale(x, weight, bias, *rest)
    dy, d_scalars = inputs.normal(*y.shape), inputs.normal(*scalars.shape)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    expected = torch.autograd.grad((y, scalars), leaves, (dy, d_scalars))
    with torch.no_grad():
        got = reference_backend.dynamic_scale_backward(
            dy, d_scalars, x, weight, scalars.detach(), *rest, True, True, biased
        )
    for one, other in zip(got, expected, strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [2, 31])
def test_the_loss_has_the_gradients_of_the_reference(inputs: Inputs, answers: bool, reverse: bool, width: int) -> None:
    rows = inputs.rows(4, width)
    call = LossArguments(
        rows.logits.requires_grad_(), rows.reference, *((rows.correct, rows.wrong, rows.direction) if answers else ()),
        margin=4.0, inverse_temperature=1.0 if answers else 0.5, exclude_answers=answers, reverse=reverse,
        need_grad=True, row_weight=None if answers else torch.tensor([1.0, 0.0, 2.0, 0.5]),
        softcap=None if answers else 5.0,
    )  # fmt: skip
    losses = reference.intervention_loss(
        call.logits, call.reference_logits, call.correct, call.wrong, call.direction, margin=4.0,
        inverse_temperature=call.inverse_temperature, exclude_answers=answers, reverse=reverse,
        row_weight=call.row_weight, softcap=call.softcap,
    )  # fmt: skip
    upstream = inputs.normal(2, 4)
    expected = torch.autograd.grad((upstream[0] * losses[0] + upstream[1] * losses[1]).sum(), call.logits)[0]
    with torch.no_grad():
        effectiveness, faithfulness, grad, answer_grad, _, _ = reference_backend.intervention_loss(*call)
        reference_backend.intervention_loss_scale_(grad, *upstream, call.correct, call.wrong, answer_grad)
    torch.testing.assert_close(torch.stack([effectiveness, faithfulness]), torch.stack(losses))
    torch.testing.assert_close(grad, expected)
    if answers:
        with torch.no_grad():
            weighted = reference_backend.intervention_loss(*call._replace(gradient_weight=upstream.t().contiguous()))
        torch.testing.assert_close(weighted[2], expected)
        assert torch.equal(torch.stack(weighted[:2]), torch.stack([effectiveness, faithfulness]))
