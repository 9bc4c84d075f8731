"""intervention_loss with its gradient in the memory of the logits."""

from __future__ import annotations

import functools

import pytest
import torch
from op_cases import DTYPES, Backend, Inputs, error_of, over
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@over(dtypes=DTYPES, shapes=[(3, 33), (9, 2501)], backends=["cpu", "triton"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_gradient_in_place_is_the_same_gradient_in_the_logits_memory(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], kl: str, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype).to(backend.device)
    upstream = tuple(inputs.normal(shape[0]).to(backend.device) for _ in range(2))
    results = []
    for inplace in (False, True):
        leaf = rows.logits.clone().requires_grad_()
        logits = leaf * 1  # as a head gives them: no leaf
        losses = ops.intervention_loss(
            logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, margin=9.0, kl=kl,
            inplace_gradient=inplace,
        )  # fmt: skip
        written = logits.detach().clone()
        (gradient,) = torch.autograd.grad(losses, logits, upstream)
        assert (gradient.data_ptr() == logits.data_ptr()) is inplace
        assert torch.equal(written, rows.logits) is not inplace
        results.append((*losses, gradient.clone()))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


@over(backends=["cpu", "triton"])
def test_a_graph_that_saved_the_overwritten_logits_says_so(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(2, 40).to(backend.device)
    logits = rows.logits.requires_grad_() * 1
    other = logits.square().sum()  # saves the logits
    ops.intervention_loss(
        logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, inplace_gradient=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize(
    ("logits", "reference", "message"),
    [
        (torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8), "a leaf, whose values the gradient would overwrite"),
        (torch.zeros(2, 9)[:, :8], torch.zeros(2, 8), "strides (9, 1), expected contiguous ones"),
    ],
)
def test_logits_that_may_not_be_overwritten_are_refused(logits: Tensor, reference: Tensor, message: str) -> None:
    ids = torch.arange(2)
    call = functools.partial(ops.intervention_loss, logits, reference, ids, ids + 2, direction=torch.ones(2))
    assert message in error_of(functools.partial(call, inplace_gradient=True), ValueError)
