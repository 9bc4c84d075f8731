"""What is CUDA's own in the scaling and the optimizer, on an emulated device: geometry, alignment, launches, order."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation.emulation import H100, emulated_backend
from op_cases import DTYPES, Inputs, assert_as_exact_as_eager
from torch import Tensor

from actscale_fast.ops import cuda, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

#: B, T, H, D: heads that are a part of a warp, of no warp's size, whole warps, and wider than a block.
SHAPES = {
    "part_of_a_warp": (3, 5, 4, 64),
    "across_warps": (2, 3, 5, 40),
    "off_the_grid": (2, 4, 3, 37),
    "two_warps": (1, 3, 2, 512),
    "wider_than_a_block": (2, 2, 1, 2100),
    "one_channel": (2, 3, 2, 1),
    "many_tokens_a_block": (2, 90, 20, 40),
}


@pytest.fixture
def device() -> Iterator[ModuleType]:
    with emulated_backend() as kernels:
        yield kernels


def scaled(x: Tensor, dy: Tensor, alpha: Tensor, shift: Tensor, beta: Tensor, group: Tensor) -> list[Tensor]:
    rest = (x, alpha, shift, -1.5, beta, group)
    return [cuda.scale_heads(*rest), *cuda.scale_heads_backward(dy, *rest, True, True, True)]


def probed(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, beta: Tensor, group: Tensor) -> list[Tensor]:
    y, scalars = cuda.dynamic_scale(x, weight, bias, -1.5, beta, group)
    return [y, scalars, *cuda.dynamic_scale_backward(dy, scalars, x, weight, scalars, -1.5, beta, group, *[True] * 3)]


def channelled(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
    x, dy = x.flatten(0, 2), dy.flatten(0, 2)
    return [cuda.scale_channels(x, weight), *cuda.scale_channels_backward(dy, x, weight, True, True)]


def cases(inputs: Inputs, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[tuple[Any, tuple[Tensor, ...]]]:
    B, _, H, D = shape
    x, dy = (inputs.normal(*shape, dtype=dtype) for _ in range(2))
    rows = (inputs.normal(B), inputs.integers(2, B))
    return [
        (scaled, (x, dy, inputs.normal(2, 1, H), inputs.normal(2, 1, H, D), *rows)),
        (probed, (x, dy, inputs.normal(2, H, D, scale=D**-0.5), inputs.normal(2, H), *rows)),
        (channelled, (x, dy, inputs.normal(D))),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_in_which_threads_run_changes_no_bit(
    inputs: Inputs, device: ModuleType, dtype: torch.dtype, shape: str
) -> None:
    for run, arguments in cases(inputs, SHAPES[shape], dtype):
        forwards = run(*arguments)
        device.run_threads_backwards(True)
        backwards = run(*arguments)
        device.run_threads_backwards(False)
        assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_off_the_16_byte_grid_the_same_bits_are_read_one_by_one(inputs: Inputs, device: ModuleType, shape: str) -> None:
    for run, (x, dy, *rest) in cases(inputs, SHAPES[shape], torch.bfloat16):
        padded = torch.full((*x.shape[:3], x.shape[3] + 3), torch.nan, dtype=x.dtype)
        apart = padded[..., 1:-2].copy_(x)
        for a, b in zip(run(x, dy, *rest), run(apart, dy, *rest), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("processors", [1, 132])
def test_the_sums_are_exact_whatever_the_device_cuts_them_into(
    inputs: Inputs, device: ModuleType, processors: int
) -> None:
    x, dy = inputs.normal(3, 43, 5, 24), inputs.normal(3, 43, 5, 24)
    alpha, shift, beta = inputs.normal(1, 1, 5), inputs.normal(1, 1, 5, 24), inputs.normal(3)
    with emulated_backend((processors, *H100[1:])):
        got = cuda.scale_heads_backward(dy, x, alpha, shift, 1.0, beta, None, False, True, True)
    exact, eager = [], []
    for dtype, results in ((torch.float64, exact), (torch.float32, eager)):
        leaves = [value.to(dtype).requires_grad_() for value in (alpha, shift)]
        y = reference.scale_heads(x.to(dtype), *leaves, 1.0, beta.to(dtype), None)
        results += torch.autograd.grad(y, leaves, dy.to(dtype))
    sizes = ((dy * x).abs().double().sum((0, 1, 3)), dy.abs().double().sum((0, 1)))
    for name, value, right, plain, size in zip(("dalpha", "dshift"), got[1:], exact, eager, sizes, strict=True):
        assert_as_exact_as_eager(name, value, right, plain, condition=beta.abs().max() * size.view_as(right))


def test_a_forward_is_one_launch_and_a_backward_two_at_most(inputs: Inputs, device: ModuleType) -> None:
    def launches(run: Any, *arguments: Any) -> int:
        before = device.launches()
        run(*arguments)
        return int(device.launches() - before)

    x, alpha, shift = inputs.normal(2, 3, 4, 8), inputs.normal(1, 1, 4), inputs.normal(1, 1, 4, 8)
    heads, probe = (alpha, shift, 1.0, None, None), inputs.normal(1, 4, 8)
    scalars = inputs.normal(2, 3, 4)
    assert launches(cuda.scale_heads, x, *heads) == 1
    assert launches(cuda.scale_heads_backward, x, x, *heads, True, True, True) == 2
    assert launches(cuda.scale_heads_backward, x, x, *heads, True, False, False) == 1
    assert launches(cuda.dynamic_scale, x, probe, None, 1.0, None, None) == 1
    rest = (x, None, x, probe, scalars, 1.0, None, None)
    assert launches(cuda.dynamic_scale_backward, *rest, True, True, True) == 2
    assert launches(cuda.dynamic_scale_backward, *rest, True, False, False) == 1
    channels = inputs.normal(8)
    assert launches(cuda.scale_channels, x, channels) == 1
    assert launches(cuda.scale_channels_backward, x, x, channels, True, True) == 2
    assert launches(cuda.scale_channels_backward, x, x, channels, True, False) == 1
    assert launches(cuda.scale_channels, x[:0], channels) == 0
    for size, expected in ((3, 1), (16 << 10, 1), ((16 << 10) + 1, 2)):
        tensors = [inputs.normal(size), inputs.normal(size), torch.zeros(size), torch.zeros(size)]
        step = torch.zeros(())
        assert launches(cuda.proximal_adam_, *tensors, step, 0.1, 0.9, 0.999, 1e-8, 0.0) == expected
        assert step == 1
    assert launches(cuda.scale_heads, x[:0], *heads) == 0


def test_the_step_is_read_by_all_threads_before_it_is_counted(inputs: Inputs, device: ModuleType) -> None:
    tensors = [inputs.normal(2000) for _ in range(2)] + [torch.zeros(2000), torch.zeros(2000)]
    results = []
    for backwards in (False, True):
        device.run_threads_backwards(backwards)
        results.append([value.clone() for value in tensors])
        cuda.proximal_adam_(*results[-1], torch.zeros(()), 0.1, 0.9, 0.999, 1e-8, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
