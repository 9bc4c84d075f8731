"""The CUDA kernels where offsets pass 2³¹: on an emulated device over memory that is mostly not there, and on a GPU."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator

import pytest
import torch
from cuda_emulation.emulation import emulated_backend
from op_cases import Inputs, Rows
from torch import Tensor

from actscale_fast.ops import backends, cuda

MAP_NORESERVE = 0x4000  # Linux's; Python has no name for it before 3.13


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulated_backend():
        yield


def loss_of(rows: Rows) -> tuple[Tensor, ...]:
    return cuda.intervention_loss(*rows, None, 1.0, 1.0, True, False, True)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def far_apart(values: Tensor) -> Tensor:
    """The same values, the first axis in steps of more than 2³¹ elements; memory between them is never touched."""
    step = 2**31 + 11
    n_bytes = values.element_size() * (step * (len(values) - 1) + values[0].numel())
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided(values.shape, (step, *values.stride()[1:])).copy_(values)


@pytest.mark.usefixtures("emulated")
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved and not there")
def test_rows_may_lie_more_than_two_to_the_31_elements_apart(inputs: Inputs) -> None:
    rows = inputs.rows(3, 77, torch.bfloat16)
    spread = rows._replace(logits=far_apart(rows.logits), reference=far_apart(rows.reference))
    assert same(loss_of(rows), loss_of(spread))
    x, dy = inputs.normal(2, 3, 4, 8), inputs.normal(2, 3, 4, 8)
    heads, probe = (inputs.normal(1, 1, 4), None, 0.5, None, None), inputs.normal(1, 4, 8)
    needs = (True, True, False)
    assert same(
        cuda.scale_heads_backward(dy, x, *heads, *needs), cuda.scale_heads_backward(far_apart(dy), x, *heads, *needs)
    )
    scalars = inputs.normal(2, 3, 4)
    rest = (None, x, probe, scalars, 0.5, None, None, True, True, True)
    assert same(cuda.dynamic_scale_backward(dy, *rest), cuda.dynamic_scale_backward(far_apart(dy), *rest))


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(bool(backends.unavailable("cuda")), reason=f"backend 'cuda': {backends.unavailable('cuda')}")
def test_more_than_two_to_the_31_logits_are_as_many_rows_alone() -> None:
    n_rows, vocab = 2**31 // 50257 + 2, 50257
    generator = torch.Generator("cuda").manual_seed(0)
    z, r = (torch.randn(n_rows, vocab, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2))
    ids = torch.arange(n_rows, device="cuda") % vocab
    rows = Rows(z, r, ids, (ids + 1) % vocab, torch.ones(n_rows, device="cuda"))
    whole = loss_of(rows)
    for row in (0, n_rows // 2, n_rows - 1):
        alone = loss_of(Rows(*(value[row : row + 1].clone() for value in rows)))
        for got, expected in zip(whole[:2], alone[:2], strict=True):
            torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole[2][row : row + 1], alone[2], rtol=1e-2, atol=1e-6)
