"""y = x·w, one factor per channel, and its gradients: arXiv 2205.05638, section 3.3 (`reference.scale_channels`).

    y[n,d] = x[n,d]·w[d],   dx[n,d] = dy[n,d]·w[d],   dw[d] = Σ_n x[n,d]·dy[n,d]
Saved for backward: x where dw is wanted, and w.
Bytes per element of x, b its size: forward 2·b (x, y); backward 3·b (dy, x, dx), less b without dx and less b without
dw. The reductions are fused into this kernel: a program adds up its rows in registers and stores one partial per
channel, which a second kernel adds up in the order of the rows. No atomics: two runs agree bit for bit.

A program takes one tile of rows × channels, reads w once, and walks over `steps` tiles of rows. Row offsets are int64
throughout: they are scalars, or one per row of the tile.

The launch constants are those of scale_heads, whose traffic is the same.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .. import outputs, strides
from .device import OPTIONS, ceil_div, on_device_of, processors
from .group_sums import sum_groups
from .scale_heads import MAX_STEPS, TILE, WARPS


@dataclass(frozen=True)
class Geometry:
    """How the grid covers [N, d]: tiles of rows × channels, `steps` tiles of rows per program."""

    rows: int  # tile
    channels: int  # tile
    channel_tiles: int
    steps: int
    chunks: int  # of `steps` tiles of rows

    @staticmethod
    def of(N: int, width: int, multiprocessors: int) -> Geometry:
        """A closed form of the shape: the widest tile, then as many steps as leave 16 programs per multiprocessor."""
        channels = min(triton.next_power_of_2(width), TILE)
        rows = min(triton.next_power_of_2(N), TILE // channels)
        channel_tiles, row_tiles = ceil_div(width, channels), ceil_div(N, rows)
        steps = min(max(row_tiles * channel_tiles // (16 * multiprocessors), 1), MAX_STEPS)
        return Geometry(rows, channels, channel_tiles, steps, ceil_div(row_tiles, steps))


@triton.jit(do_not_specialize=["N", "steps"])
def scale_channels_fwd_kernel(
    p_y,  # [N, D]
    p_x,  # [N, D]
    p_weight,  # [D]
    N,
    D,
    steps,
    stride_y,
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0)[None, :]
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK_N
    for i in range(steps):
        n = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        here = (n < N)[:, None] & (d < D)[None, :]
        b_x = tl.load(p_x + (n * stride_x)[:, None] + d[None, :], mask=here).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        tl.store(p_y + (n * stride_y)[:, None] + d[None, :], (b_x * b_weight).to(p_y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["N", "steps", "dy_step"])
def scale_channels_bwd_kernel(
    p_dx,  # [N, D], or None
    p_dweight,  # partial sums [chunks, D], or None
    p_dy,  # [N, D]
    p_x,  # read for dweight alone
    p_weight,
    N,
    D,
    steps,
    stride_dx,
    stride_dy,
    dy_step,  # 0: all rows of dy are its first one, else 1
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0)[None, :]
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK_N
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(steps):
        n = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        here = (n < N)[:, None] & (d < D)[None, :]
        b_dy = tl.load(p_dy + (n * dy_step * stride_dy)[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
        if p_dweight is not None:
            b_x = tl.load(p_x + (n * stride_x)[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
            b_sum += b_dy * b_x
        if p_dx is not None:
            b_dx = (b_dy * b_weight).to(p_dx.dtype.element_ty)
            tl.store(p_dx + (n * stride_dx)[:, None] + d[None, :], b_dx, mask=here)
    if p_dweight is not None:
        p_dweight += tl.program_id(0).to(tl.int64) * D
        tl.store(p_dweight + d, tl.sum(b_sum, 0), mask=d < D)


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    """y [..., d]; see `interface.BackendModule`."""
    N, width, stride = strides.rows_of(x)
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    geometry = Geometry.of(N, width, processors(x.device))
    with on_device_of(x):
        scale_channels_fwd_kernel[geometry.chunks, geometry.channel_tiles](
            y, x, weight, N, width, geometry.steps, width, stride,
            BLOCK_N=geometry.rows, BLOCK_D=geometry.channels, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return y


def scale_channels_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), empty where not needed; see `interface.BackendModule`."""
    N, width, stride = strides.rows_of(x)
    dx, dweight = outputs.scale_channels_gradients(x, weight, need_dx, need_dweight)
    if x.numel() == 0 or not (need_dx or need_dweight):
        return dx, dweight.zero_()
    dy, dy_stride = strides.gradient_rows(dy.to(x.dtype))
    # A stride of 0 would be compiled as one that 16 divides, whose sums are laid out, and so rounded, in another way.
    dy_step, dy_stride = (1, dy_stride) if dy_stride else (0, width)
    geometry = Geometry.of(N, width, processors(x.device))
    partial = weight.new_empty(1, 1, geometry.chunks, width) if need_dweight else None
    with on_device_of(x):
        scale_channels_bwd_kernel[geometry.chunks, geometry.channel_tiles](
            dx if need_dx else None, partial, dy, x, weight, N, width, geometry.steps, width, dy_stride, dy_step,
            stride,
            BLOCK_N=geometry.rows, BLOCK_D=geometry.channels, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        if partial is not None:
            sum_groups(dweight.view(1, 1, width), partial, None)
    return dx, dweight
