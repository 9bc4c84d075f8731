"""y = x·(1 + β·α) + β·v per head, and its gradients. Formula: arXiv 2410.04962, eq. 4 and 5 (`reference.scale_heads`).

With g the row's group, p its position (or 0), β = strength · row_strength[b]:
    y[b,t,h,:]        = x·(1 + β·α[g,p,h]) + β·v[g,p,h,:]
    dx                = dy·(1 + β·α)
    dα[g,p,h]         = Σ_{b in g} β Σ_t ⟨x, dy⟩         (no sum over t where p is t)
    dv[g,p,h,:]       = Σ_{b in g} β Σ_t dy              (likewise)
Saved for backward: x where dα is wanted, and the scalars.
Bytes per element of x, b its size: forward 2·b (x, y); backward 3·b (x, dy, dx), less b without dx and less b without
dα. The reductions are fused into this kernel: each program adds up its own positions in registers and stores one
partial per head (for dv per channel), which a second kernel adds up in the order of rows and positions. No atomics: two
runs agree bit for bit. Where every position has its own v, each partial is one position and dv costs 8 more bytes per
element.

A program takes one tile of heads × channels and walks over `steps` positions of one row, so that a contiguous x is read
in contiguous runs. Row offsets are int64 throughout: they are scalars.

The launch constants have not been measured on a GPU yet; benchmarks/README.md says how they were chosen.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .. import outputs, strides
from ..calls import extents
from .device import OPTIONS, ceil_div, on_device_of, processors
from .group_sums import sum_groups

TILE = 2048
MAX_STEPS = 64
WARPS = 4


@dataclass(frozen=True)
class Geometry:
    """How the grid covers [B, T, H, D]: tiles of heads × channels, `steps` positions of one row a program."""

    heads: int  # tile
    channels: int  # tile
    head_tiles: int
    channel_tiles: int
    steps: int
    chunks: int  # of `steps` positions

    @staticmethod
    def of(B: int, T: int, H: int, D: int, multiprocessors: int) -> Geometry:
        """A closed form of the shape: the widest tile, then as many steps as leave 16 programs per multiprocessor."""
        channels = min(triton.next_power_of_2(D), TILE)
        heads = min(triton.next_power_of_2(H), TILE // channels)
        head_tiles, channel_tiles = ceil_div(H, heads), ceil_div(D, channels)
        tiles = B * T * head_tiles * channel_tiles
        steps = min(max(tiles // (16 * multiprocessors), 1), MAX_STEPS, T)
        return Geometry(heads, channels, head_tiles, channel_tiles, steps, ceil_div(T, steps))


@triton.jit
def _row_state(p_strength, p_group, strength, b, G, H):
    """(β, group, the number of heads whose scalars may be read: none where the group does not exist) of row b."""
    beta = strength
    if p_strength is not None:
        beta = strength * tl.load(p_strength + b)
    if p_group is not None:
        g = tl.load(p_group + b)
    else:
        g = tl.where(G > 1, b, 0).to(tl.int64)
    return beta, g, tl.where((g >= 0) & (g < G), H, 0)


@triton.jit(do_not_specialize=["T", "G", "step_p", "steps", "chunks"])
def scale_heads_fwd_kernel(
    p_y,  # [B, T, H, D]
    p_x,  # [B, T, H, D]
    p_alpha,  # [G, P, H] or None
    p_shift,  # [G, P, H, D] or None
    p_strength,  # [B] or None
    p_group,  # [B] or None
    strength,
    T,
    H,
    D,
    G,
    P,
    step_p,  # 1 where positions have scalars of their own, else 0
    steps,
    chunks,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_xb,
    stride_xt,
    stride_xh,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head_tiles = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    b = (pid // head_tiles // chunks).to(tl.int64)
    first = (pid // head_tiles % chunks).to(tl.int64) * steps
    h = pid % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = (h < H)[:, None] & (d < D)[None, :]
    beta, g, known_heads = _row_state(p_strength, p_group, strength, b, G, H)

    p_x += b * stride_xb + (h.to(tl.int64) * stride_xh)[:, None] + d[None, :]
    p_y += b * stride_yb + (h.to(tl.int64) * stride_yh)[:, None] + d[None, :]
    for i in range(tl.minimum(steps, T - first).to(tl.int32)):
        t = first + i
        b_y = tl.load(p_x + t * stride_xt, mask=here).to(tl.float32)  # [BLOCK_H, BLOCK_D]
        scalars = (g * P + t * step_p) * H
        if p_alpha is not None:
            b_alpha = tl.load(p_alpha + scalars + h, mask=h < known_heads, other=float("nan"))
            b_y = b_y * (1 + beta * b_alpha)[:, None]
        if p_shift is not None:
            offsets = scalars * D + h[:, None] * D + d[None, :]
            b_y += beta * tl.load(p_shift + offsets, mask=here & (h < known_heads)[:, None], other=float("nan"))
        tl.store(p_y + t * stride_yt, b_y.to(p_y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T", "G", "step_p", "steps", "chunks"])
def scale_heads_bwd_kernel(
    p_dx,  # like x, or None
    p_dalpha,  # partial sums [B, chunks, channel tiles, H], or None; a chunk is one position where step_p is 1
    p_dshift,  # partial sums [B, chunks, H, D], or None
    p_dy,  # [B, T, H, D]
    p_x,  # read for dalpha alone
    p_alpha,
    p_strength,
    p_group,
    strength,
    T,
    H,
    D,
    G,
    P,
    step_p,
    steps,
    chunks,
    stride_gb,  # of dy
    stride_gt,
    stride_gh,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_db,  # of dx
    stride_dt,
    stride_dh,
    BY_POSITION: tl.constexpr,  # step_p == 1
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head_tiles = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    row = (pid // head_tiles).to(tl.int64)
    b = (pid // head_tiles // chunks).to(tl.int64)
    first = (pid // head_tiles % chunks).to(tl.int64) * steps
    h = pid % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = (h < H)[:, None] & (d < D)[None, :]
    beta, g, known_heads = _row_state(p_strength, p_group, strength, b, G, H)

    p_dy += b * stride_gb + (h.to(tl.int64) * stride_gh)[:, None] + d[None, :]
    if p_dalpha is not None:
        p_x += b * stride_xb + (h.to(tl.int64) * stride_xh)[:, None] + d[None, :]
    if p_dx is not None:
        p_dx += b * stride_db + (h.to(tl.int64) * stride_dh)[:, None] + d[None, :]

    b_dalpha = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    b_dshift = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i in range(tl.minimum(steps, T - first).to(tl.int32)):
        t = first + i
        b_dy = tl.load(p_dy + t * stride_gt, mask=here, other=0.0).to(tl.float32)
        if p_dalpha is not None:
            b_product = b_dy * tl.load(p_x + t * stride_xt, mask=here, other=0.0).to(tl.float32)
            if BY_POSITION:
                partial = ((b * T + t) * tl.num_programs(1) + tl.program_id(1)) * H
                tl.store(p_dalpha + partial + h, beta * tl.sum(b_product, 1), mask=h < H)
            else:
                b_dalpha += b_product
        if p_dshift is not None:
            if BY_POSITION:
                tl.store(p_dshift + (b * T + t) * H * D + h[:, None] * D + d[None, :], beta * b_dy, mask=here)
            else:
                b_dshift += b_dy
        if p_dx is not None:
            if p_alpha is not None:
                b_alpha = tl.load(p_alpha + (g * P + t * step_p) * H + h, mask=h < known_heads, other=float("nan"))
                b_dy = b_dy * (1 + beta * b_alpha)[:, None]
            elif p_group is not None:
                b_dy = tl.where(known_heads == H, b_dy, float("nan"))
            tl.store(p_dx + t * stride_dt, b_dy.to(p_dx.dtype.element_ty), mask=here)
    if not BY_POSITION:
        if p_dalpha is not None:
            partial = (row * tl.num_programs(1) + tl.program_id(1)) * H
            tl.store(p_dalpha + partial + h, beta * tl.sum(b_dalpha, 1), mask=h < H)
        if p_dshift is not None:
            tl.store(p_dshift + row * H * D + h[:, None] * D + d[None, :], beta * b_dshift, mask=here)


def scale_heads(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """y [B, T, H, D]; see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    y = outputs.like(x)
    if x.numel() == 0:
        return y
    B, T, H, D = x.shape
    geometry = Geometry.of(B, T, H, D, processors(x.device))
    G, *positions = extents(alpha, shift)
    P = max(positions)
    with on_device_of(x):
        scale_heads_fwd_kernel[B * geometry.chunks * geometry.head_tiles, geometry.channel_tiles](
            y, x, alpha, shift, row_strength, group, strength, T, H, D, G, P, int(P > 1),
            geometry.steps, geometry.chunks, *y.stride()[:3], *x.stride()[:3],
            BLOCK_H=geometry.heads, BLOCK_D=geometry.channels, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return y


def scale_heads_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
    need_dx: bool,
    need_dalpha: bool,
    need_dshift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dalpha, dshift), empty where not needed; see `interface.BackendModule`."""
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # the kernel walks along D by ones
    if need_dalpha:
        strides.require_unit_stride(x)
    dx, dalpha, dshift = outputs.scale_heads_gradients(x, alpha, shift, need_dx, need_dalpha, need_dshift)
    if x.numel() == 0 or not (need_dx or need_dalpha or need_dshift):
        return dx, dalpha.zero_(), dshift.zero_()
    B, T, H, D = x.shape
    geometry = Geometry.of(B, T, H, D, processors(x.device))
    G, *positions = extents(alpha, shift)
    P = max(positions)
    by_position = P > 1
    rows = (B, P, 1) if by_position else (B, 1, geometry.chunks)
    dalpha_partial = dshift_partial = None
    if dalpha.numel():
        dalpha_partial = dalpha.new_empty((*rows[:2], rows[2] * geometry.channel_tiles, H))
    if dshift.numel():
        dshift_partial = dshift.new_empty((*rows, H * D))
    with on_device_of(x):
        scale_heads_bwd_kernel[B * geometry.chunks * geometry.head_tiles, geometry.channel_tiles](
            dx if need_dx else None, dalpha_partial, dshift_partial, dy, x, alpha, row_strength, group, strength,
            T, H, D, G, P, int(by_position), geometry.steps, geometry.chunks,
            *dy.stride()[:3], *x.stride()[:3], *(dx.stride()[:3] if need_dx else (0, 0, 0)),
            BY_POSITION=by_position, BLOCK_H=geometry.heads, BLOCK_D=geometry.channels, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
        if dalpha_partial is not None:
            sum_groups(dalpha, dalpha_partial, group)
        if dshift_partial is not None:
            sum_groups(dshift, dshift_partial, group)
    return dx, dalpha, dshift
