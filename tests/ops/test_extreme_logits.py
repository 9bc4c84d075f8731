"""Rows of logits at the ends of their dtype, and mixes of those with −inf: every backend agrees with float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import Backend, Inputs, over
from torch import Tensor

from actscale_fast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: (temperature, softcap)
SOFTMAXES = ((1.0, None), (0.5, None), (2.0, None), (1.0, 30.0), (1.0, 0.5))
KINDS = (
    "ordinary",
    "least",
    "greatest",
    "far_below",
    "half_least",
    "half_infinite",
    "least_and_infinite",
    "first_block",
)


def row(kind: str, width: int, dtype: torch.dtype, inputs: Inputs) -> Tensor:
    least = torch.finfo(dtype).min
    values, half = inputs.normal(width, scale=3.0), inputs.normal(width) > 0
    half[:2] = torch.tensor([True, False])
    if kind in ("least", "greatest", "far_below"):
        values[:] = {"least": least, "greatest": -least, "far_below": least / 100}[kind]
    elif kind == "half_least":
        values[half] = least
    elif kind == "half_infinite":
        values[half] = -torch.inf
    elif kind == "least_and_infinite":
        values = torch.where(half, least, -torch.inf)
    elif kind == "first_block":
        values[: width * 2 // 3] = least
    return values.to(dtype)


def spread(rows: Tensor) -> Tensor:
    """The distance of the largest finite value of each row from the smallest, float64 [N]."""
    wide = rows.double()
    finite = wide.isfinite()
    return wide.where(finite, -torch.inf).amax(-1) - wide.where(finite, torch.inf).amin(-1)


def exact(logits: Tensor, reference: Tensor, i: float, softcap: float | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """(KL, its gradient by the logits) in float64, the maximum subtracted before anything else."""
    z, r = logits.double(), reference.double()
    slope = torch.ones_like(z)
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z, r = softcap * torch.tanh(z / softcap), softcap * torch.tanh(r / softcap)
    log_q, log_p = (((t - t.amax(-1, keepdim=True)) * i).log_softmax(-1) for t in (z, r))
    weight, other = (log_q, log_p) if reverse else (log_p, log_q)
    difference = torch.where(weight.exp() == 0, 0.0, weight - other)
    divergence = (weight.exp() * difference).sum(-1)
    if reverse:
        q = log_q.exp()
        return divergence, i * slope * torch.where(q == 0, 0.0, q * (difference - divergence[:, None]))
    return divergence, i * slope * (log_q.exp() - log_p.exp())


@over(dtypes=DTYPES, shapes=(7,), native_shapes=(130, 5001))
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_rows_at_the_ends_of_their_dtype_have_the_divergence_and_gradient_of_float64(
    backend: Backend, dtype: torch.dtype, shape: int, kl: str, inputs: Inputs
) -> None:
    pairs = [(a, b) for a in KINDS for b in KINDS]
    logits = torch.stack([row(a, shape, dtype, inputs) for a, _ in pairs])
    reference = torch.stack([row(b, shape, dtype, inputs) for _, b in pairs])
    # Kernels compute in float32 whatever the dtype. Where they are interpreted, one kind of softmax shows the dtype,
    # and the other kinds take turns at the pairs.
    slow = backend.name in ("triton", "cuda") and backend.device.type == "cpu"
    for number, (temperature, softcap) in enumerate(SOFTMAXES[:1] if slow and dtype != torch.float32 else SOFTMAXES):
        mine = slice(number - 1, None, len(SOFTMAXES) - 1) if slow and number else slice(None)
        check(backend, logits[mine], reference[mine], kl, temperature, softcap)


def check(
    backend: Backend, logits: Tensor, reference: Tensor, kl: str, temperature: float, softcap: float | None
) -> None:
    value, gradient = exact(logits, reference, 1 / temperature, softcap, kl == "reverse")
    leaf = logits.to(backend.device, copy=True).requires_grad_()
    got = ops.kl_div_from_logits(leaf, reference.to(backend.device), temperature=temperature, softcap=softcap, kl=kl)
    (got_gradient,) = torch.autograd.grad(got.sum(), leaf)
    # At T < 1 a log-probability may leave float32, and the divergence with it.
    greatest = torch.finfo(torch.float32).max
    inside = value < (greatest * 0.99 if temperature >= 1 else 1e30)
    if temperature < 1:
        inside &= (spread(logits) < temperature * greatest) & (spread(reference) < temperature * greatest)
    assert not got.isnan().any(), (temperature, softcap)

    def assert_close(found: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
        where = f"temperature {temperature}, softcap {softcap}: "
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: where + text)

    assert_close(got.detach().cpu()[inside], value.float()[inside], rtol=1e-3, atol=2e-5)
    size = 1 + value[inside, None] / temperature  # of the terms whose difference the reverse gradient is
    most = torch.finfo(logits.dtype).max
    got_rows, rows = (g[inside].double().clamp(-most, most) for g in (got_gradient.cpu(), gradient))
    assert_close(got_rows / size, rows / size, rtol=2e-2, atol=1e-3)


@over(dtypes=DTYPES)
@pytest.mark.parametrize("kind", ["least", "greatest", "least_and_infinite", "first_block"])
@pytest.mark.parametrize("exclude_answers", [True, False])
def test_the_intervention_loss_of_an_extreme_row_to_itself_is_exactly_0_with_its_gradient(
    backend: Backend, dtype: torch.dtype, kind: str, exclude_answers: bool, inputs: Inputs
) -> None:
    logits = torch.stack([row(kind, 300, dtype, inputs) for _ in range(3)]).to(backend.device)
    logits[:, :2] = logits[:, 2:].amax()  # the answers, of a finite difference
    answers = torch.zeros(3, dtype=torch.int64, device=backend.device)
    leaf = logits.clone().requires_grad_()
    effectiveness, faithfulness = ops.intervention_loss(
        leaf, logits, answers, answers + 1, direction=torch.ones(3, device=backend.device),
        exclude_answers=exclude_answers,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(faithfulness.sum(), leaf)
    assert torch.equal(effectiveness.cpu(), torch.ones(3))
    assert torch.equal(faithfulness.cpu(), torch.zeros(3))
    assert not gradient.any()


@over(dtypes=DTYPES)
@pytest.mark.parametrize("masked_with", ["least", "infinite"])
def test_a_vocabulary_masked_in_the_bias_of_the_head_has_the_divergence_of_the_tokens_left(
    backend: Backend, dtype: torch.dtype, masked_with: str, inputs: Inputs
) -> None:
    hidden, other = (inputs.normal(4, 16, dtype=dtype) for _ in range(2))
    weight, masked = inputs.normal(90, 16, dtype=dtype, scale=0.3), torch.arange(90) % 3 == 2
    least = torch.finfo(dtype).min if masked_with == "least" else -torch.inf
    bias = torch.where(masked, least, 0.0).to(dtype)
    answers = torch.zeros(4, dtype=torch.int64)
    kept = (~masked).nonzero()[2:, 0]  # without the answers, 0 and 1
    log_q, log_p = ((t.double() @ weight.double()[kept].t()).log_softmax(-1) for t in (other, hidden))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)

    def moved(*tensors: Tensor) -> list[Tensor]:
        return [t.to(backend.device) for t in tensors]

    hidden, other, weight, bias, correct, direction = moved(hidden, other, weight, bias, answers, torch.ones(4))
    statistics = ops.reference_statistics(hidden, weight, correct, correct + 1, bias=bias)
    _, divergence = ops.linear_intervention_loss(
        other, weight, statistics, correct, correct + 1, direction=direction, bias=bias
    )
    torch.testing.assert_close(divergence.cpu().double(), expected, rtol=1e-2, atol=1e-3)
    bias[:2] = least  # the answers, which the KL of all tokens takes part of
    value = ops.linear_kl_div(other, weight, hidden, bias=bias)
    torch.testing.assert_close(value.cpu().double(), expected, rtol=5e-2, atol=2e-2)


@over(backends=("reference",), dtypes=(torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_reference_backend_gives_a_row_and_itself_exactly_no_gradient(
    backend: Backend, dtype: torch.dtype, kl: str, inputs: Inputs
) -> None:
    logits = inputs.normal(5, 1001, dtype=dtype, scale=4.0)
    for temperature, softcap in ((1.0, None), (0.7, None), (3.0, 20.0)):
        leaf = logits.clone().requires_grad_()
        divergence = ops.kl_div_from_logits(leaf, logits, kl=kl, temperature=temperature, softcap=softcap)
        (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
        assert not divergence.any()
        assert not gradient.any()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_formula_of_the_reference_gradient_is_the_derivative_to_second_order(reverse: bool, inputs: Inputs) -> None:
    from actscale_fast.ops import reference

    z, r = inputs.normal(2, 5).double().requires_grad_(), inputs.normal(2, 5).double()

    def divergence(logits: Tensor) -> Tensor:
        return reference.kl_divergence(logits, r, reverse=reverse, inverse_temperature=0.7)

    assert torch.autograd.gradcheck(divergence, z)
    assert torch.autograd.gradgradcheck(divergence, z)
