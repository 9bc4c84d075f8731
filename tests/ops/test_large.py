"""More than 2³¹ elements through the C++ kernels, in bfloat16; up to 9 GiB.

On a GPU: `test_triton_kernels` and `test_cuda_large`.

Every tensor is one small block over and over, so that it is made fast and each part's result is known from the block's.
The plain PyTorch of `reference` has no offsets of its own and would need float32 copies.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from op_cases import Inputs
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import backends

ROOM = 12 << 30  # bytes that the largest of these tests needs, and some to spare

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(psutil.virtual_memory().available < ROOM, reason="needs 12 GiB of free memory"),
    pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="the C++ extension was not built"),
]

REPEATS, BLOCK = 257, 1 << 23  # 257 · 2²³ elements: 2³¹ is passed by the last block alone


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with ops.use_backend("cpu"):
        yield
    gc.collect()


@pytest.fixture
def kernels() -> Any:
    return pytest.importorskip("actscale_fast.ops.cpu")


def repeated(block: Tensor) -> Tensor:
    """`block` REPEATS times along its first axis."""
    return block.expand(REPEATS, *block.shape).flatten(0, 1)  # expanded: this copies


def assert_every_part_is(whole: Tensor, part: Tensor) -> None:
    assert whole.numel() > 2**31
    for got in whole.unflatten(0, (REPEATS, -1)):
        assert torch.equal(got, part)


def test_the_loss_and_its_gradient_of_more_than_two_to_the_31_logits(inputs: Inputs) -> None:
    rows = inputs.rows(64, BLOCK // 64, torch.bfloat16)
    reference = rows.reference[:1]  # one row for all: row stride 0
    ids = (rows.correct, rows.wrong)

    def losses(logits: Tensor, repeats: int) -> tuple[Tensor, ...]:
        c, w, s = (value.repeat(repeats) for value in (*ids, rows.direction))
        logits.requires_grad_()
        e, f = ops.intervention_loss(logits, reference.expand(len(logits), -1), c, w, direction=s)
        upstream = torch.linspace(0.5, 1.5, 64).repeat(repeats)
        return e.detach(), f.detach(), torch.autograd.grad((e, f), logits, (upstream, upstream))[0]

    whole, part = losses(repeated(rows.logits), REPEATS), losses(rows.logits, 1)
    assert_every_part_is(whole[2], part[2])
    for got, right in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(got, right.repeat(REPEATS))


def test_the_reference_logits_may_be_more_than_two_to_the_31(inputs: Inputs) -> None:
    reference = inputs.normal(64, BLOCK // 64, dtype=torch.bfloat16)
    logits = inputs.normal(1, BLOCK // 64, dtype=torch.bfloat16)
    with torch.no_grad():
        part = ops.kl_div_from_logits(logits.expand(64, -1), reference)
        whole = repeated(reference)
        assert whole.numel() > 2**31
        assert torch.equal(ops.kl_div_from_logits(logits.expand(len(whole), -1), whole), part.repeat(REPEATS))


@pytest.mark.parametrize("dynamic", [False, True], ids=["scale_heads", "dynamic_scale"])
def test_scaling_more_than_two_to_the_31_activations(dynamic: bool, kernels: Any, inputs: Inputs) -> None:
    block = inputs.normal(16, 128, 32, 128, dtype=torch.bfloat16)
    alpha, probe, strength = inputs.normal(1, 1, 32), inputs.normal(1, 32, 128, scale=0.1), inputs.normal(16)
    upstream = inputs.normal(128, dtype=torch.bfloat16)  # one vector for every head: strides 0

    def forward(x: Tensor) -> Tensor:
        beta = strength.repeat(len(x) // 16)
        if dynamic:
            return kernels.dynamic_scale(x, probe, None, 1.0, beta, None)[0]
        return kernels.scale_heads(x, alpha, None, 1.0, beta, None)

    def backward(x: Tensor, scalars: Tensor | None) -> tuple[Tensor, Tensor]:
        beta, dy = strength.repeat(len(x) // 16), upstream.expand(x.shape)
        if scalars is not None:
            return kernels.dynamic_scale_backward(dy, None, x, probe, scalars, 1.0, beta, None, True, True, False)[:2]
        return kernels.scale_heads_backward(dy, x, alpha, None, 1.0, beta, None, True, True, False)[:2]

    scalars = kernels.dynamic_scale(block, probe, None, 1.0, strength, None)[1] if dynamic else None
    x, part = repeated(block), forward(block)
    assert_every_part_is(forward(x), part)
    dx, dlearned = backward(x, None if scalars is None else scalars.repeat(REPEATS, 1, 1, 1))
    right = backward(block, scalars)
    assert_every_part_is(dx, right[0])
    torch.testing.assert_close(dlearned, right[1] * REPEATS, rtol=1e-4, atol=1e-3 * float(dlearned.abs().max()))
