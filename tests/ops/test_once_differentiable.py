"""A gradient of a gradient: an op that does not have it says so, also under a loss's upstream of 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import Backend, Inputs, over
from torch import Tensor

from actscale_fast import ops

Leaves = list[Tensor]
Case = tuple[Callable[..., Tensor], Leaves]  # a loss, and what it is differentiated by


def intervention_loss(inputs: Inputs, device: torch.device) -> Case:
    rows = inputs.rows(3, 11).to(device)

    def loss(logits: Tensor) -> Tensor:
        return ops.intervention_loss(
            logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction
        )[1].sum()  # fmt: skip

    return loss, [rows.logits]


def kl_div_from_logits(inputs: Inputs, device: torch.device) -> Case:
    rows = inputs.rows(3, 11).to(device)
    return lambda z: ops.kl_div_from_logits(z, rows.reference, reduction="sum"), [rows.logits]


def linear_kl_div(inputs: Inputs, device: torch.device, **options: Any) -> Case:
    other = inputs.normal(3, 5).to(device)
    leaves = [inputs.normal(3, 5).to(device), inputs.normal(11, 5).to(device)]
    return lambda h, w: ops.linear_kl_div(h, w, other, **options).sum(), leaves


def linear_kl_div_of_a_mean(inputs: Inputs, device: torch.device) -> Case:
    return linear_kl_div(inputs, device, reduction="mean")


def linear_intervention_loss(inputs: Inputs, device: torch.device, *, learns: bool = False) -> Case:
    rows = inputs.rows(3, 11).to(device)
    weight, frozen, hidden = (inputs.normal(*s).to(device) for s in ((11, 5), (3, 5), (3, 5)))
    known = ops.reference_statistics(frozen, weight, rows.correct, rows.wrong, keep_logits=learns)

    def loss(h: Tensor, w: Tensor = weight) -> Tensor:
        return ops.linear_intervention_loss(h, w, known, rows.correct, rows.wrong, direction=rows.direction)[1].sum()

    return loss, [hidden, weight] if learns else [hidden]


def linear_intervention_loss_of_a_head(inputs: Inputs, device: torch.device) -> Case:
    return linear_intervention_loss(inputs, device, learns=True)


def scale_heads(inputs: Inputs, device: torch.device) -> Case:
    leaves = [inputs.normal(2, 3, 2, 4).to(device), inputs.normal(1, 1, 2).to(device)]
    return lambda x, alpha: ops.scale_heads(x, alpha).sum(), leaves


def dynamic_scale(inputs: Inputs, device: torch.device) -> Case:
    leaves = [inputs.normal(2, 3, 2, 4).to(device), inputs.normal(2, 4).to(device)]
    return lambda x, weight: ops.dynamic_scale(x, weight).sum(), leaves


def scale_channels(inputs: Inputs, device: torch.device) -> Case:
    leaves = [inputs.normal(3, 4).to(device), inputs.normal(4).to(device)]
    return lambda x, weight: ops.scale_channels(x, weight).sum(), leaves


CASES = [
    intervention_loss, kl_div_from_logits, linear_kl_div, linear_kl_div_of_a_mean, linear_intervention_loss,
    linear_intervention_loss_of_a_head, scale_heads, dynamic_scale, scale_channels,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@over(backends=["cpu", "cuda"])
def test_a_gradient_penalty_is_refused_and_not_dropped(
    backend: Backend, case: Callable[[Inputs, torch.device], Case], inputs: Inputs
) -> None:
    function, values = case(inputs, backend.device)
    leaves = [value.detach().requires_grad_() for value in values]
    for differentiate in (lambda total: total.backward(), lambda total: torch.autograd.grad(total, leaves)):
        loss = function(*(leaf * 1.5 for leaf in leaves))
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=case.__name__.split("_of_")[0] + ".* once differentiable"):
            differentiate(loss + sum(g.square().sum() for g in gradients))


@pytest.mark.parametrize("case", CASES)
@over(backends=["cpu", "cuda"])
def test_create_graph_alone_changes_no_gradient(
    backend: Backend, case: Callable[[Inputs, torch.device], Case], inputs: Inputs
) -> None:
    function, values = case(inputs, backend.device)
    leaves = [value.detach().requires_grad_() for value in values]
    plain, kept = (torch.autograd.grad(function(*leaves), leaves, create_graph=c) for c in (False, True))
    assert not any(g.requires_grad for g in plain)
    assert all(torch.equal(a, b.detach()) for a, b in zip(plain, kept, strict=True))
