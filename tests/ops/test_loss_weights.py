"""intervention_loss with weights: w_E·E + w_F·F of each row, whose gradient is finished in the forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import assert_gradient, fused, upstreams
from op_cases import DTYPES, Backend, Inputs, Rows, error_of, over, textbook_losses
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import registry

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def weighted(
    rows: Rows, weights: tuple[Tensor, Tensor], upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, loss, gradient of the logits); `upstream`: of the loss, or its sum."""
    logits = rows.logits.detach().requires_grad_()
    given = dict(direction=rows.direction, weights=weights, **options)
    source = logits * 1 if options.get("inplace_gradient") else logits
    e, f, loss = ops.intervention_loss(source, rows.reference, rows.correct, rows.wrong, **given)
    assert not e.requires_grad
    assert not f.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum() if upstream is None else loss, logits, upstream)
    return e, f, loss.detach(), gradient


@over(dtypes=DTYPES, shapes=[(1, 3), (5, 31), (3, 257)], native_shapes=[(3, 50257)])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("exclude_answers", [True, False])
def test_the_gradient_of_the_weighted_loss_is_rounded_once(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], exclude_answers: bool, kl: str, inputs: Inputs
) -> None:
    rows, weights = inputs.rows(*shape, dtype=dtype).to(backend.device), upstreams(inputs, shape[0], backend.device)
    options = {"margin": 2.0, "exclude_answers": exclude_answers, "kl": kl}
    e, f, loss, gradient = weighted(rows, weights, **options)
    plain = fused(rows, weights, **options)
    assert torch.equal(e, plain[0])
    assert torch.equal(f, plain[1])
    torch.testing.assert_close(loss, weights[0] * e + weights[1] * f)
    exact, eager = (textbook_losses(rows, weights, d, **options) for d in (torch.float64, torch.float32))
    # Scaled by 1: no second rounding is allowed.
    assert_gradient(gradient, exact, eager, (weights[0], torch.ones_like(weights[1])), backend)


@over(dtypes=DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_an_upstream_of_the_weighted_loss_scales_each_row(
    backend: Backend, dtype: torch.dtype, in_place: bool, inputs: Inputs
) -> None:
    rows, weights = inputs.rows(4, 67, dtype).to(backend.device), upstreams(inputs, 4, backend.device)
    once = weighted(rows, weights, inplace_gradient=in_place)[3]
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0], device=backend.device)  # powers of two: no digits are lost
    torch.testing.assert_close(weighted(rows, weights, upstream)[3], once * upstream[:, None].to(dtype))


@over()
def test_rows_of_weight_zero_keep_their_losses_and_have_no_gradient(backend: Backend, inputs: Inputs) -> None:
    rows, zeros = inputs.rows(3, 41).to(backend.device), torch.zeros(3, device=backend.device)
    e, f, loss, gradient = weighted(rows, (zeros, zeros), margin=50.0)
    assert (e > 0).all()
    assert (f > 0).all()
    assert not loss.any()
    assert not gradient.any()
    only_hinge = weighted(rows, (zeros + 1, zeros), margin=50.0)[3]
    assert (only_hinge != 0).sum(1).tolist() == [2, 2, 2]
    only_kl = weighted(rows, (zeros, zeros + 1), margin=50.0)[3]
    assert not only_kl.gather(1, torch.stack([rows.correct, rows.wrong], 1)).any()


@over(backends=["cpu"])
def test_a_sum_of_weighted_losses_makes_no_second_pass(
    backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that scales the gradient skips rows whose upstream is 1."""
    seen = []
    kernels = registry.module("cpu")
    scale = kernels.intervention_loss_scale_

    def noted(grad: Tensor, *arguments: Any) -> None:
        before = grad.clone()
        scale(grad, *arguments)
        seen.append((arguments[1].tolist(), torch.equal(before, grad)))

    monkeypatch.setattr(kernels, "intervention_loss_scale_", noted)
    rows, weights = inputs.rows(3, 33, torch.bfloat16), upstreams(inputs, 3, backend.device)
    weighted(rows, weights)
    assert seen == [([1.0, 1.0, 1.0], True)]


@over()
def test_the_weighted_loss_compiles_into_one_graph(backend: Backend, inputs: Inputs) -> None:
    torch.compiler.reset()
    rows, weights = inputs.rows(3, 29).to(backend.device), upstreams(inputs, 3, backend.device)

    def call(logits: Tensor, w_e: Tensor, w_f: Tensor) -> Tensor:
        answers = (rows.reference, rows.correct, rows.wrong)
        e, f, loss = ops.intervention_loss(logits * 2.0, *answers, direction=rows.direction, weights=(w_e, w_f))
        return loss.sum() + 0.0 * (e + f).sum()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        logits = rows.logits.detach().requires_grad_()
        value = function(logits, *weights)
        results.append((value.detach(), *torch.autograd.grad(value, logits)))
    torch.testing.assert_close(results[0], results[1])
    torch.compiler.reset()


@over()
def test_wrong_weights_are_named(backend: Backend, inputs: Inputs) -> None:
    rows, ones = inputs.rows(3, 29).to(backend.device), torch.ones(3, device=backend.device)

    def message(weights: Any, error: type[Exception]) -> str:
        return error_of(lambda: weighted(rows, weights), error)

    assert message(ones, TypeError) == "weights: got Tensor, expected two tensors [3]"
    assert message((ones,), TypeError) == "weights: got tuple, expected two tensors [3]"
    assert message((1.0, ones), TypeError) == "weights[0]: got float, expected a tensor [3]"
    assert message((ones, ones[:2]), ValueError) == "weights[1]: got shape (2,), expected (3,)"
    learned = ones.clone().requires_grad_()
    expected = "weights[1]: requires a gradient, but it is not differentiated"
    assert message((ones, learned), ValueError) == expected


@over()
def test_the_norm_of_the_scalars_comes_after_the_weighted_loss(backend: Backend, inputs: Inputs) -> None:
    rows, weights = inputs.rows(3, 29).to(backend.device), upstreams(inputs, 3, backend.device)
    scalars = inputs.normal(5).to(backend.device).requires_grad_()
    given = (rows.logits, rows.reference, rows.correct, rows.wrong)
    *_, loss, l1 = ops.intervention_loss(*given, direction=rows.direction, weights=weights, scalars=scalars)
    assert loss.shape == (3,)
    torch.testing.assert_close(l1, scalars.abs().sum())
    torch.testing.assert_close(torch.autograd.grad(l1, scalars)[0], scalars.sign().detach())
