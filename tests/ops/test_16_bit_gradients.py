"""Gradients of 16-bit parameters are summed in float32 and rounded once; float16 rows keep their own scale.

The heads here have logits that 16 bits hold exactly, so that float64 follows the same logits and what is left to bound
is each rounding of a gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import Head
from op_cases import (
    ROUNDINGS,
    Backend,
    Inputs,
    Rows,
    assert_as_exact_as_eager,
    over,
    textbook_losses,
    textbook_scale,
    ulp,
)
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALVES = (torch.bfloat16, torch.float16)


def assert_within(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """|got − exact| ≤ allowed + the half ulp of rounding the result."""
    error = (got.detach().cpu().double() - exact).abs()
    allowed = allowed + ulp(exact, got.dtype) / 2
    bad = ~(error <= allowed)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: got {float(got[at])}, exact {float(exact[at])}, error {float(error[at]):.3g}, allowed"
            f" {float(allowed[at]):.3g}; {int(bad.sum())} such"
        )


@over(dtypes=HALVES)
@pytest.mark.parametrize("one_for_all_positions", ["alpha", "shift"])
def test_a_16_bit_parameter_beside_one_by_position_sums_its_gradient_over_positions_in_float32(
    backend: Backend, dtype: torch.dtype, one_for_all_positions: str, inputs: Inputs
) -> None:
    rows, tokens, heads, dim = 2, 24, 6, 5
    positions = {"alpha": tokens, "shift": tokens, one_for_all_positions: 1}
    half = inputs.normal(rows, tokens // 2, heads, dim)
    # The second half of the positions takes nearly all of the first half's gradient back: rounding each position's part
    # to 16 bits would cost several ulp of what is left.
    dy = torch.cat([half, -(1 + 2**-5) * half], 1).to(dtype)
    x = inputs.normal(rows, tokens // 2, heads, dim, dtype=dtype).repeat(1, 2, 1, 1)
    alpha = inputs.normal(1, positions["alpha"], heads, dtype=dtype)
    shift = inputs.normal(1, positions["shift"], heads, dim, dtype=dtype)
    strength = inputs.normal(rows)
    leaves = [t.to(backend.device).requires_grad_() for t in (alpha, shift)]
    y = ops.scale_heads(x.to(backend.device), leaves[0], shift=leaves[1], strength=strength.to(backend.device))
    got = torch.autograd.grad(y, leaves, dy.to(backend.device))

    def expected(x: Tensor, dy: Tensor, strength: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        value, (_, *wide) = textbook_scale(x, alpha, shift, strength, None, dtype)
        return torch.autograd.grad(value, [t for t in wide if t is not None], dy.to(dtype))

    exact, eager = (expected(x, dy, strength, kind) for kind in (torch.float64, torch.float32))
    conditions = expected(x.abs(), dy.abs(), strength.abs(), torch.float64)
    for name, *values, condition in zip(("alpha", "shift"), got, exact, eager, conditions, strict=True):
        assert values[0].dtype == dtype
        assert_as_exact_as_eager(name, *values, condition=condition)


@over()
def test_the_gradient_of_a_position_may_leave_float16_where_their_sum_does_not(
    backend: Backend, inputs: Inputs
) -> None:
    x = torch.zeros(2, 2, 1, 4, dtype=torch.float16, device=backend.device)  # two rows: each position gets ±120000
    dy = torch.tensor([60000.0, -59968.0], dtype=torch.float16, device=backend.device)[None, :, None, None].expand(
        x.shape
    )
    alpha = torch.zeros(1, 2, 1, dtype=torch.float16, device=backend.device)
    shift = torch.zeros(1, 1, 1, 4, dtype=torch.float16, device=backend.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.scale_heads(x, alpha, shift=shift), shift, dy)
    assert gradient.flatten().tolist() == [64.0] * 4


def exact_head(inputs: Inputs, n_rows: int, dtype: torch.dtype, *, alike: bool) -> Head:
    """Hidden states of ±1 over a head of quarters: `dtype` holds the logits. With `alike` all rows are equal."""
    vocab, width = 31, 8
    signs = 1.0 - 2.0 * inputs.integers(2, 2, 1 if alike else n_rows, width)
    frozen, steered = signs.expand(2, n_rows, width).contiguous().to(dtype)
    weight, bias = ((inputs.integers(7, *shape) - 3).to(dtype) / 4 for shape in ((vocab, width), (vocab,)))
    correct = torch.full((n_rows,), int(inputs.integers(vocab, 1)))
    return Head(frozen, steered, weight, bias, correct, (correct + 3) % vocab, torch.ones(n_rows), {})


def learned(h: Head) -> list[Tensor]:
    assert h.bias is not None
    return [t.detach().requires_grad_() for t in (h.steered, h.weight, h.bias)]


def exact_logits(h: Head) -> tuple[Tensor, Tensor]:
    assert h.bias is not None
    steered, frozen = (
        t.cpu().double() @ h.weight.cpu().double().t() + h.bias.cpu().double() for t in (h.steered, h.frozen)
    )
    assert torch.equal(steered, steered.to(h.weight.dtype).double())
    return steered, frozen


@over(dtypes=HALVES)
def test_chunks_of_a_16_bit_head_that_learns_are_added_in_float32(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    check_sum_over_chunks(backend, dtype, inputs)


# A graph of many chunks takes seconds to make. The test above has each backend with each dtype, and the same lines add
# the chunks of both: one dtype is enough for a backend.
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.bfloat16), ("cpu", torch.float16)], ids=str, indirect=["backend"]
)
def test_a_graph_adds_the_chunks_of_a_16_bit_head_that_learns_in_float32(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    torch.compiler.reset()
    check_sum_over_chunks(backend, dtype, inputs, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


def check_sum_over_chunks(there: Backend, dtype: torch.dtype, inputs: Inputs, **compiler: Any) -> None:
    """Rows of a small upstream between two of a large one: a sum in 16 bits loses them, whichever end it begins at."""
    n_rows = 12
    h = exact_head(inputs, n_rows, dtype, alike=True).to(there.device)
    upstream = torch.full((n_rows,), torch.finfo(dtype).eps * 16)
    upstream[[0, -1]] = 64.0
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, bias=h.bias, keep_logits=True)

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_intervention_loss(
            hidden, weight, statistics, *h.answers, direction=h.direction, bias=bias, margin=40.0, chunk_bytes=1
        )

    call = torch.compile(losses, **compiler) if compiler else losses
    leaves, u = learned(h), upstream.to(there.device)
    got = torch.autograd.grad(call(*leaves), leaves[1:], (u, u))
    rows = Rows(*exact_logits(h), h.correct.cpu(), h.wrong.cpu(), h.direction.cpu())
    exact = textbook_losses(rows, (upstream, upstream), torch.float64, margin=40.0)
    # A row's gradient is rounded when it is made; its upstream, a power of two, leaves the digits alone.
    factor = upstream.double()[:, None]
    allowed = ROUNDINGS / 2 * ulp(exact.gradient_condition, torch.float32)
    allowed = allowed + factor * ulp(exact.gradient / factor, dtype) / (1 if there.truncates(dtype) else 2)
    steered = h.steered.cpu().double()
    assert_within("weight", got[0], exact.gradient.t() @ steered, allowed.t() @ steered.abs())
    assert_within("bias", got[1], exact.gradient.sum(0), allowed.sum(0))


@over()
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@pytest.mark.parametrize("source", ["upstream", "row_weight", "sum", "mean"])
def test_float16_rows_that_count_little_keep_their_gradient_beside_one_that_counts_much(
    backend: Backend, source: str, learns: bool, kl: str, inputs: Inputs
) -> None:
    """A factor of 2⁻²² between rows is more than one float16 tensor of all rows holds."""
    h = exact_head(inputs, 5, torch.float16, alike=False)
    h.steered[3] = h.frozen[3]  # counts much and has no gradient
    factor = inputs.normal(5).abs().clamp(0.5, 2) / 2**10
    factor[[1, 3]] *= 2**22
    check_float16_rows(h, factor, backend, source, learns, kl)
    factor[1] /= 2**22  # now all that the head's gradient sums up is small
    check_float16_rows(h, factor, backend, source, learns, kl)


def check_float16_rows(h: Head, factor: Tensor, backend: Backend, source: str, learns: bool, kl: str) -> None:
    there, u = h.to(backend.device), factor.to(backend.device)
    leaves = learned(there)[: 3 if learns else 1]
    options: dict[str, Any] = {"reference_weight": there.weight, "reference_bias": there.bias, "kl": kl}
    hidden, weight, bias = (*leaves, there.weight, there.bias)[:3] if learns else (leaves[0], there.weight, there.bias)
    if source != "upstream":
        options["row_weight"] = u
    options["reduction"] = source if source in ("sum", "mean") else "none"
    loss = ops.linear_kl_div(hidden, weight, there.frozen, bias=bias, chunk_bytes=1000, **options)
    sent = {"upstream": u, "sum": u.new_ones(()), "mean": u.sum(), "row_weight": torch.ones_like(u)}[source]
    got = torch.autograd.grad(loss, leaves, sent)
    rows = Rows(*exact_logits(h), h.correct, h.wrong, h.direction)
    exact = textbook_losses(rows, (factor, factor), torch.float64, kl=kl, answers=False)
    f = factor.double()[:, None]
    # One rounding where a row's gradient by its logits is made, before its factor is applied.
    allowed = (
        ROUNDINGS / 2 * ulp(exact.gradient_condition, torch.float32) + f * ulp(exact.gradient / f, torch.float16) / 2
    )
    W, steered = h.weight.double(), h.steered.double()
    d_hidden = exact.gradient @ W
    # The product with W is rounded, and again when the factor is applied.
    assert_within("hidden", got[0], d_hidden, allowed @ W.abs() + f * ulp(d_hidden / f, torch.float16) / 2)
    if learns:
        assert_within("weight", got[1], exact.gradient.t() @ steered, allowed.t() @ steered.abs())
        assert_within("bias", got[2], exact.gradient.sum(0), allowed.sum(0))
