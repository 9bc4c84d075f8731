"""intervention_loss with its gradient in the memory of the logits."""

from __future__ import annotations

import functools

import pytest
import torch
from op_cases import DTYPES, Backend, Inputs, error_of, over
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@over(dtypes=DTYPES, shapes=[(3, 33), (9, 2501)], backends=["cpu", "triton", "cuda"])
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


@over(backends=["cpu", "triton", "cuda"])
def test_a_graph_that_saved_the_overwritten_logits_says_so(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(2, 40).to(backend.device)
    logits = rows.logits.requires_grad_() * 1
    other = logits.square().sum()  # saves the logits
    ops.intervention_loss(
        logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, inplace_gradient=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


LEAF = "a leaf, whose values the gradient would overwrite; expected the result of an operation"
SHARED = "share memory with reference_logits, expected memory of their own"
BATCH = torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("logits", "reference", "message"),
    [
        (torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8), LEAF),
        (torch.zeros(2, 9)[:, :8], torch.zeros(2, 8), "strides (9, 1), expected contiguous ones"),
        (BATCH[:2], BATCH[:2], SHARED),
        (BATCH[:2], BATCH[1:3], SHARED),
        (BATCH[2:4], BATCH[::4], SHARED),  # between its rows: refused too
        (BATCH[1:3], BATCH[1:2].expand(2, 8), SHARED),
    ],
)
def test_logits_that_may_not_be_overwritten_are_refused(logits: Tensor, reference: Tensor, message: str) -> None:
    ids = torch.arange(2)
    call = functools.partial(ops.intervention_loss, logits, reference, ids, ids + 2, direction=torch.ones(2))
    assert message in error_of(functools.partial(call, inplace_gradient=True), ValueError)


@over(backends=["reference", "cpu", "triton", "cuda"])
def test_the_steered_and_the_frozen_rows_may_be_halves_of_one_batch(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 40).to(backend.device)
    gradients = []
    for halves in (slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3)):
        leaf = torch.empty(6, 40, device=backend.device)
        leaf[halves[0]], leaf[halves[1]] = rows.logits, rows.reference
        batch = leaf.requires_grad_() * 1
        reference = batch.detach()[halves[1]]
        losses = ops.intervention_loss(
            batch[halves[0]], reference, rows.correct, rows.wrong, direction=rows.direction, inplace_gradient=True
        )
        (gradient,) = torch.autograd.grad(losses[0].sum() + losses[1].sum(), leaf)
        assert torch.equal(reference, rows.reference)
        assert not gradient[halves[1]].any()
        gradients.append(gradient[halves[0]])
    leaf = rows.logits.clone().requires_grad_()
    apart = ops.intervention_loss(leaf, rows.reference, rows.correct, rows.wrong, direction=rows.direction)
    (expected,) = torch.autograd.grad(apart[0].sum() + apart[1].sum(), leaf)
    assert all(torch.equal(gradient, expected) for gradient in gradients)
