"""α = ⟨w, x⟩ + c, y = x·(1 + β·α) per head, and its gradients. Formula: arXiv 2410.04962, eq. 10 (`reference`).

With g the row's group, β = strength · row_strength[b], dα the upstream of α (0 where it has none):
    a[b,t,h] = β·⟨x, dy⟩ + dα
    dx       = dy·(1 + β·α) + a·w[g,h,:]
    dw[g,h,:] = Σ_{b in g} Σ_t a·x,   dc[g,h] = Σ_{b in g} Σ_t a
Saved for backward: x, the probes, and α in float32, 4 bytes per vector.
Bytes per element of x, b its size: forward 2·b (x, y); backward 3·b (x, dy, dx), 2·b without dx. The reductions
are fused into this kernel: each program adds up its own tokens in registers and stores one partial of H·D floats, which
`group_sums` adds up in order: 8 bytes per element for each `steps` tokens. No atomics: two runs agree bit for bit.

A program takes one tile of heads × channels, with all channels of a head in it, keeps its probes in registers and
walks over `steps` tokens: of one row where rows have probes of their own, else of all rows in order. Heads wider than
MAX_CHANNELS (there is no widest) are walked over twice in tiles, for the product and for the rest; the second time the
vector comes from the cache, and so does the program's partial of dw, which no longer fits registers.

The launch constants have not been measured on a GPU yet; benchmarks/README.md says how they were chosen.
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

TILE = 2048  # elements of a program that takes several heads, for 4 warps
MAX_CHANNELS = 8192  # of a head in one tile, for 16 warps
ELEMENTS_A_WARP = 512
MAX_STEPS = 64  # float32 sums of that many tokens stay as exact as PyTorch's
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 16, 4  # a multiprocessor, of 4 warps


@dataclass(frozen=True)
class Geometry:
    """How the grid covers [B, T, H, D]: `spans` of tokens that share their probes, cut into chunks of `steps`."""

    heads: int  # tile
    channels: int  # tile
    head_tiles: int
    wide: bool  # a head takes several tiles of channels
    warps: int
    span: int  # tokens: of one row, or of all
    steps: int
    chunks: int  # of a span
    programs: int

    @staticmethod
    def of(B: int, T: int, H: int, D: int, by_row: bool, multiprocessors: int, programs_each: int) -> Geometry:
        """A closed form of the shape: as many steps as leave `programs_each` of 4 warps per multiprocessor."""
        channels = triton.next_power_of_2(max(D, 1)) if D <= MAX_CHANNELS else TILE
        heads = min(triton.next_power_of_2(H), max(TILE // channels, 1))
        head_tiles = ceil_div(H, heads)
        warps = max(heads * channels // ELEMENTS_A_WARP, 4)
        spans, span = (B, T) if by_row else (1, B * T)
        wanted = max(programs_each * multiprocessors * 4 // warps, 1)
        steps = min(max(ceil_div(B * T * head_tiles, wanted), 1), MAX_STEPS, span)
        chunks = ceil_div(span, steps)
        grid = spans * chunks * head_tiles
        return Geometry(heads, channels, head_tiles, channels < D, warps, span, steps, chunks, grid)


@triton.jit
def _place(p_group, T, H, G, span, steps, chunks, BLOCK_H: tl.constexpr):
    """(chunk of all, its first row and position, its tokens, heads, group, heads whose probes may be read)."""
    head_tiles = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    chunk = pid // head_tiles
    first = (chunk % chunks).to(span.dtype) * steps  # int32, whose division is cheap, up to 2³¹ tokens
    b = (tl.where(span == T, chunk // chunks, 0) + first // T).to(tl.int64)
    t = (first % T).to(tl.int64)
    h = pid % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    g = tl.zeros([], tl.int64)
    if p_group is not None:
        g = tl.load(p_group + b)
    known_heads = tl.where((g >= 0) & (g < G), H, 0)
    return chunk.to(tl.int64), b, t, tl.minimum(steps, span - first).to(tl.int32), h, g, known_heads


@triton.jit(do_not_specialize=["T", "G", "span", "steps", "chunks"])
def dynamic_scale_fwd_kernel(
    p_y,  # [B, T, H, D]
    p_scalars,  # α [B, T, H]
    p_x,  # [B, T, H, D]
    p_weight,  # [G, H, D]
    p_bias,  # [G, H] or None
    p_strength,  # [B] or None
    p_group,  # [B] or None
    strength,
    T,
    H,
    D,
    G,
    span,
    steps,
    chunks,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_xb,
    stride_xt,
    stride_xh,
    WIDE: tl.constexpr,  # D > BLOCK_D
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, b, t, count, h, g, known_heads = _place(p_group, T, H, G, span, steps, chunks, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    here = (h < H)[:, None] & (d < D)[None, :]
    p_weight += (g * H + h)[:, None] * D + d[None, :]
    p_x += (h.to(tl.int64) * stride_xh)[:, None] + d[None, :]
    p_y += (h.to(tl.int64) * stride_yh)[:, None] + d[None, :]
    if p_bias is not None:
        b_bias = tl.load(p_bias + g * H + h, mask=h < known_heads, other=float("nan"))
    else:
        b_bias = tl.where(h < known_heads, 0.0, float("nan"))
    if not WIDE:
        b_weight = tl.load(p_weight, mask=here & (h < known_heads)[:, None], other=0.0)
    beta = strength
    for _ in range(count):
        if p_strength is not None:
            beta = strength * tl.load(p_strength + b)
        p_x_here = p_x + (b * stride_xb + t * stride_xt)
        p_y_here = p_y + (b * stride_yb + t * stride_yt)
        if WIDE:
            b_product = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            for start in range(0, D, BLOCK_D):
                mask = (h < known_heads)[:, None] & (start + d < D)[None, :]
                b_x = tl.load(p_x_here + start, mask=mask, other=0.0).to(tl.float32)
                b_product += b_x * tl.load(p_weight + start, mask=mask, other=0.0)
        else:
            b_x = tl.load(p_x_here, mask=here, other=0.0).to(tl.float32)
            b_product = b_x * b_weight
        b_alpha = tl.sum(b_product, 1) + b_bias
        tl.store(p_scalars + (b * T + t) * H + h, b_alpha, mask=h < H)
        b_factor = (1 + beta * b_alpha)[:, None]
        if WIDE:
            for start in range(0, D, BLOCK_D):
                mask = (h < H)[:, None] & (start + d < D)[None, :]
                b_x = tl.load(p_x_here + start, mask=mask, other=0.0).to(tl.float32)
                tl.store(p_y_here + start, (b_x * b_factor).to(p_y.dtype.element_ty), mask=mask)
        else:
            tl.store(p_y_here, (b_x * b_factor).to(p_y.dtype.element_ty), mask=here)
        t += 1
        b = tl.where(t == T, b + 1, b)
        t = tl.where(t == T, 0, t)


@triton.jit(do_not_specialize=["T", "G", "span", "steps", "chunks"])
def dynamic_scale_bwd_kernel(
    p_dx,  # like x, or None
    p_dweight,  # partial sums [chunks of all, H, D], or None
    p_dbias,  # partial sums [chunks of all, H], or None
    p_dy,  # [B, T, H, D]
    p_d_scalars,  # [B, T, H] or None
    p_x,  # [B, T, H, D]
    p_weight,  # [G, H, D], read for dx alone
    p_scalars,  # [B, T, H], read for dx alone
    p_strength,
    p_group,
    strength,
    T,
    H,
    D,
    G,
    span,
    steps,
    chunks,
    stride_gb,  # of dy
    stride_gt,
    stride_gh,
    stride_sb,  # of the upstream of α
    stride_st,
    stride_sh,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_db,  # of dx
    stride_dt,
    stride_dh,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk, b, t, count, h, g, known_heads = _place(p_group, T, H, G, span, steps, chunks, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    here = (h < H)[:, None] & (d < D)[None, :]
    p_x += (h.to(tl.int64) * stride_xh)[:, None] + d[None, :]
    p_dy += (h.to(tl.int64) * stride_gh)[:, None] + d[None, :]
    if p_dx is not None:
        p_dx += (h.to(tl.int64) * stride_dh)[:, None] + d[None, :]
        p_weight += (g * H + h)[:, None] * D + d[None, :]
        if not WIDE:
            b_weight = tl.load(p_weight, mask=here & (h < known_heads)[:, None], other=0.0)
    if p_dweight is not None:
        p_dweight += chunk * H * D + h[:, None] * D + d[None, :]
    b_dweight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    b_dbias = tl.zeros([BLOCK_H], tl.float32)
    beta = strength
    for i in range(count):
        if p_strength is not None:
            beta = strength * tl.load(p_strength + b)
        p_x_here = p_x + (b * stride_xb + t * stride_xt)
        p_dy_here = p_dy + (b * stride_gb + t * stride_gt)
        if WIDE:
            b_product = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            for start in range(0, D, BLOCK_D):
                mask = (h < H)[:, None] & (start + d < D)[None, :]
                b_x = tl.load(p_x_here + start, mask=mask, other=0.0).to(tl.float32)
                b_product += b_x * tl.load(p_dy_here + start, mask=mask, other=0.0).to(tl.float32)
        else:
            b_x = tl.load(p_x_here, mask=here, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dy_here, mask=here, other=0.0).to(tl.float32)
            b_product = b_x * b_dy
        b_a = beta * tl.sum(b_product, 1)
        if p_d_scalars is not None:
            p_here = p_d_scalars + (b * stride_sb + t * stride_st) + h.to(tl.int64) * stride_sh
            b_a += tl.load(p_here, mask=h < H, other=0.0)
        b_dbias += b_a
        if p_dx is not None:
            b_alpha = tl.load(p_scalars + (b * T + t) * H + h, mask=h < H, other=0.0)  # NaN where no such group
            b_factor = (1 + beta * b_alpha)[:, None]
            p_dx_here = p_dx + (b * stride_db + t * stride_dt)
        if WIDE:
            for start in range(0, D, BLOCK_D):
                mask = (h < H)[:, None] & (start + d < D)[None, :]
                if p_dx is not None:
                    b_dy = tl.load(p_dy_here + start, mask=mask, other=0.0).to(tl.float32)
                    b_weight = tl.load(p_weight + start, mask=mask & (h < known_heads)[:, None], other=0.0)
                    b_dx = b_dy * b_factor + b_a[:, None] * b_weight
                    tl.store(p_dx_here + start, b_dx.to(p_dx.dtype.element_ty), mask=mask)
                if p_dweight is not None:
                    b_x = tl.load(p_x_here + start, mask=mask, other=0.0).to(tl.float32)
                    b_before = tl.load(p_dweight + start, mask=mask & (i > 0), other=0.0)
                    tl.store(p_dweight + start, b_before + b_a[:, None] * b_x, mask=mask)
            tl.debug_barrier()  # the next token adds to what all threads of the program have stored
        else:
            if p_dx is not None:
                b_dx = b_dy * b_factor + b_a[:, None] * b_weight
                tl.store(p_dx_here, b_dx.to(p_dx.dtype.element_ty), mask=here)
            if p_dweight is not None:
                b_dweight += b_a[:, None] * b_x
        t += 1
        b = tl.where(t == T, b + 1, b)
        t = tl.where(t == T, 0, t)
    if p_dweight is not None and not WIDE:
        tl.store(p_dweight, b_dweight, mask=here)
    if p_dbias is not None:
        tl.store(p_dbias + chunk * H + h, b_dbias, mask=h < H)


def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, D], α [B, T, H]); see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    y, scalars = outputs.dynamic_scale(x)
    if scalars.numel() == 0:
        return y, scalars
    B, T, H, D = x.shape
    geometry = Geometry.of(B, T, H, D, group is not None, processors(x.device), FORWARD_PROGRAMS)
    with on_device_of(x):
        dynamic_scale_fwd_kernel[(geometry.programs,)](
            y, scalars, x, weight, bias, row_strength, group, strength, T, H, D, weight.shape[0],
            geometry.span, geometry.steps, geometry.chunks, *y.stride()[:3], *x.stride()[:3],
            WIDE=geometry.wide, BLOCK_H=geometry.heads, BLOCK_D=geometry.channels, num_warps=geometry.warps, **OPTIONS,
        )  # fmt: skip
    return y, scalars


def dynamic_scale_backward(
    dy: Tensor,
    d_scalars: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scalars: Tensor,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), empty where not needed; see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # the kernel walks along D by ones
    dx, dweight, dbias = outputs.dynamic_scale_gradients(x, weight, need_dx, need_dweight, need_dbias)
    if scalars.numel() == 0 or not (need_dx or need_dweight or need_dbias):
        return dx, dweight.zero_(), dbias.zero_()
    B, T, H, D = x.shape
    geometry = Geometry.of(B, T, H, D, group is not None, processors(x.device), BACKWARD_PROGRAMS)
    spans = (B if group is not None else 1, 1, geometry.chunks)
    dweight_partial = weight.new_empty((*spans, H * D)) if need_dweight else None
    dbias_partial = weight.new_empty((*spans, H)) if need_dbias else None
    with on_device_of(x):
        dynamic_scale_bwd_kernel[(geometry.programs,)](
            dx if need_dx else None, dweight_partial, dbias_partial, dy, d_scalars, x, weight, scalars, row_strength,
            group, strength, T, H, D, weight.shape[0], geometry.span, geometry.steps, geometry.chunks,
            *dy.stride()[:3], *((0, 0, 0) if d_scalars is None else d_scalars.stride()), *x.stride()[:3],
            *(dx.stride()[:3] if need_dx else (0, 0, 0)),
            WIDE=geometry.wide, BLOCK_H=geometry.heads, BLOCK_D=geometry.channels, num_warps=geometry.warps, **OPTIONS,
        )  # fmt: skip
        if dweight_partial is not None and D:
            sum_groups(dweight, dweight_partial, group)
        if dbias_partial is not None:
            sum_groups(dbias, dbias_partial, group)
    return dx, dweight, dbias
