"""The memory of the losses from hidden states, as PyTorch's profiler counts it: what `chunk_bytes` promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import Head, head
from op_cases import DTYPES, Backend, Inputs, over
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops.losses.linear_softmax import in_chunks
from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")
CHUNK_BYTES = 1 << 20


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(200, 3001, 16), (500, 1001, 300), (64, 5003, 200)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_softmax_in_chunks_takes_no_more_than_its_chunk_beside_its_results(
    dtype: torch.dtype, shape: tuple[int, int, int], bias: bool, inputs: Inputs
) -> None:
    h = head(inputs, shape, dtype)
    of_bias = inputs.normal(shape[1]).to(torch.promote_types(dtype, torch.float32)) if bias else None
    arguments = (h.frozen, h.weight, of_bias, *h.answers, True, 0.8, CHUNK_BYTES)
    peak = peak_bytes(lambda: in_chunks(*arguments), CPU)
    assert peak <= CHUNK_BYTES + bytes_of(*in_chunks(*arguments))
    assert peak >= CHUNK_BYTES / 4  # nor are the chunks much smaller than they may be


@over(dtypes=[torch.float32, torch.bfloat16], backends=["reference", "cpu"])
def test_statistics_take_no_more_than_their_chunk_beside_the_results(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    h = head(inputs, (400, 1001, 900), dtype)
    made = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    peak = peak_bytes(
        lambda: tuple(vars(ops.reference_statistics(h.frozen, h.weight, *h.answers, chunk_bytes=CHUNK_BYTES)).values()),
        CPU,
    )
    assert peak <= CHUNK_BYTES + made.n_bytes + 16 * 8 * 400


def step(h: Head, reference: ops.ReferenceStatistics, leaves: list[Tensor], **how: Any) -> tuple[Tensor, ...]:
    """Losses and gradients of the steered hidden states and, where it learns, of the head: `leaves`."""
    weight, bias = (leaves[1], leaves[2]) if len(leaves) > 1 else (h.weight, h.bias)
    losses = ops.linear_intervention_loss(
        leaves[0], weight, reference, *h.answers, direction=h.direction, chunk_bytes=CHUNK_BYTES,
        **{**h.of_head, "bias": bias}, **how,
    )  # fmt: skip
    return torch.autograd.grad(losses[0].sum() + losses[1].sum(), leaves)


@over(dtypes=[torch.float32, torch.bfloat16], backends=["reference", "cpu"])
@pytest.mark.parametrize("variant", [{"softcap": 5.0}, {"kl": "reverse"}, {"learned": True}], ids=str)
def test_losses_from_logits_take_no_more_than_their_chunk_beside_their_results(
    backend: Backend, dtype: torch.dtype, variant: dict[str, Any], inputs: Inputs
) -> None:
    h = head(inputs, (300, 2003, 16), dtype, bias=True, **{k: v for k, v in variant.items() if k == "softcap"})
    how = {k: v for k, v in variant.items() if k == "kl"}
    assert h.bias is not None
    reference = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head, **how, keep_logits=True)
    leaves = [h.steered.detach().requires_grad_()]
    if "learned" in variant:
        leaves += [h.weight.requires_grad_(), h.bias.requires_grad_()]
    gradients = step(h, reference, leaves, **how)
    of_rows = 300 * (16 * 4 * 3 + 64)  # [N, d] and [N] floats
    results = bytes_of(*gradients) + (4 * h.weight.numel() if dtype != torch.float32 else 0)  # dW before it is rounded
    assert peak_bytes(lambda: step(h, reference, leaves, **how), CPU) <= CHUNK_BYTES + results + of_rows


@over(backends=["reference", "cpu"])
def test_between_the_passes_a_head_that_learns_holds_nothing_of_rows_times_the_vocabulary(
    backend: Backend, inputs: Inputs
) -> None:
    peaks = []
    for n_rows in (300, 1200):
        h = head(inputs, (n_rows, 2003, 4))
        reference = ops.reference_statistics(h.frozen, h.weight, *h.answers, keep_logits=True)
        leaves = [h.steered.requires_grad_(), h.weight.requires_grad_(), torch.zeros(2003).requires_grad_()]
        peaks.append(peak_bytes(lambda: step(h, reference, leaves), CPU))  # noqa: B023  (called here)
    assert peaks[1] - peaks[0] <= 900 * 2003 * 4 / 10


@over(dtypes=[torch.bfloat16, torch.float16], backends=["reference", "cpu"])
def test_the_gradient_of_a_16_bit_head_is_added_up_over_many_chunks_without_rounding(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    """400 chunks of one row: each one's gradient rounded to 16 bits and added to such a sum loses digits."""
    h = head(inputs, (400, 31, 8), dtype, bias=True)
    assert h.bias is not None
    upstream = inputs.normal(400).abs(), inputs.normal(400).abs()

    def gradients(leaves: list[Tensor], chunk_bytes: int) -> tuple[Tensor, ...]:
        reference = ops.reference_statistics(h.frozen, h.weight, *h.answers, bias=h.bias, keep_logits=True)
        losses = ops.linear_intervention_loss(
            leaves[0], leaves[1], reference, *h.answers, bias=leaves[2], direction=h.direction, chunk_bytes=chunk_bytes
        )
        return torch.autograd.grad(losses, leaves, upstream)

    leaves = [t.detach().requires_grad_() for t in (h.steered, h.weight, h.bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    # The logits are rounded to 16 bits as the model's are; everything after them is exact.
    logits = torch.nn.functional.linear(h.steered.detach(), h.weight.detach(), h.bias.detach())
    products = wide[0] @ wide[1].t() + wide[2]
    z = products + (logits.double() - products).detach()
    r = torch.nn.functional.linear(h.frozen, h.weight.detach(), h.bias.detach()).double()
    with ops.use_backend("reference"):
        exact = ops.intervention_loss(z, r, *h.answers, direction=h.direction)
    d_z, *expected = torch.autograd.grad(exact, [z, *wide[1:]], tuple(u.double() for u in upstream))
    eps = torch.finfo(dtype).eps
    # A sum's terms are rounded once, as the gradient of the logits: independent errors of at most eps/2, uniform.
    squares = d_z.square().t() @ wide[0].detach().square(), d_z.square().sum(0)
    for got, wanted, square in zip(gradients(leaves, 1)[1:], expected, squares, strict=True):
        deviation = eps / 2 / 3**0.5 * square.sqrt()
        assert ((got.double() - wanted).abs() <= eps * wanted.abs() + 6 * deviation).all()
