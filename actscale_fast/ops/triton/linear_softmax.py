"""The step between the two matrix products of `linear_softmax`: products of rows become the weights e^{z − max}.

With x = W·h the raw products (float32), b the bias, s the scale of the logits, over the columns that are kept:
    M = max(x + b),  e = 2^{(x + b − M)·s·log2(e)},  L = Σ e,  A = Σ e·log e,  B = Σ e·b
    log_sum = s·M + log L,   answers = s·(x + b) at c and w
e is at most 1, so 16 bits hold it; the mean of W's rows is (Σ e·W)/L, and no pass is spent on dividing e by L.
Bytes per product: read 4 for the sums; read 4 and write the size of W's dtype for e. With 128 rows of V = 128256 the
products take 6 % of the bytes of a W with d = 4096. The float64 log_sum is made in the kernel: a KL is the small
difference of two of them.

Rows are split over programs as in intervention_loss.py, with the same launch constants (not measured on a GPU yet).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses.linear_softmax import in_chunks
from .columns import MAX_SPLITS, Tiling, in_tile, row_shift, row_start, tile_positions
from .device import on_device_of, processors
from .softmaxes import LN2, LOG2E, finite


@triton.jit
def _answer(p_x, p_bias, column, valid):
    z = tl.load(p_x + column, mask=valid, other=float("nan"))
    if p_bias is not None:
        z += tl.load(p_bias + column, mask=valid, other=0.0)
    return z


@triton.jit
def _tile(
    p_x,  # where the row's first tile begins
    p_bias,
    c,
    w,
    V,
    shift,  # columns before the row at which its first tile begins
    tile,
    EXCLUDE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(x + b, b) of a tile, −inf where a column is not kept."""
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    positions = tile_positions(UNROLL, LANES, VECTOR)
    first = tile * TILE - shift
    whole = (first >= 0) & (first + TILE <= V)
    if EXCLUDE:
        whole = whole & ((in_tile(c, first, TILE) | in_tile(w, first, TILE)) == 0)
    columns = first + positions
    inside = (columns >= 0) & (columns < V)
    if whole:  # a mask a column would break 16-byte accesses up
        b_z = tl.load(p_x + tile * TILE + positions)
    else:
        kept = inside
        if EXCLUDE:
            kept = kept & (columns != c) & (columns != w)
        b_z = tl.load(p_x + tile * TILE + positions, mask=kept, other=float("-inf"))
    b_bias = b_z
    if p_bias is not None:
        b_bias = tl.load(p_bias + columns, mask=inside, other=0.0)
        b_z += b_bias
    return b_z, b_bias


@triton.jit
def _both_inside(c, w, V):
    return (c >= 0) & (c < V) & (w >= 0) & (w < V)


@triton.jit(do_not_specialize=["splits", "tiles"])
def softmax_rows_scan_kernel(
    p_partials,  # [R, 4, splits]: M, L, A/s, B
    p_x,  # [R, V] float32
    p_bias,  # [V] float32 or None
    p_correct,  # [R] or None
    p_wrong,
    p_answers,  # [R, 2] or None
    V,
    splits,
    tiles,
    logit_scale,
    EXCLUDE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    scale = logit_scale * LOG2E
    c = row
    w = row
    if p_correct is not None:
        c = tl.load(p_correct + row)
        w = tl.load(p_wrong + row)
        if split == 0:  # here, because the weights may overwrite the products
            valid = _both_inside(c, w, V)
            tl.store(p_answers + row * 2, logit_scale * _answer(p_x + row * V, p_bias, c, valid))
            tl.store(p_answers + row * 2 + 1, logit_scale * _answer(p_x + row * V, p_bias, w, valid))
    p_x += row_start(row, V, VECTOR, SHIFTED)
    shift = row_shift(row, V, VECTOR, SHIFTED)
    m = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    spread = tl.zeros([LANES], tl.float32)
    in_bias = tl.zeros([LANES], tl.float32)
    for tile in range(split * tiles, split * tiles + tiles):
        b_z, b_bias = _tile(p_x, p_bias, c, w, V, shift, tile, EXCLUDE, UNROLL, LANES, VECTOR)
        top = tl.maximum(m, tl.max(tl.max(b_z, 2), 0))
        b_z -= finite(top)[None, :, None]
        b_e = tl.exp2(b_z * scale)
        factor = tl.exp2((m - finite(top)) * scale)
        spread = tl.where(factor == 0.0, 0.0, factor * (spread + total * (finite(m) - finite(top))))
        spread += tl.sum(tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_z), 2), 0)
        total = total * factor + tl.sum(tl.sum(b_e, 2), 0)
        if p_bias is not None:
            in_bias = in_bias * factor + tl.sum(tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_bias), 2), 0)
        m = top
    top = tl.max(m, 0)
    factor = tl.exp2((m - finite(top)) * scale)
    spread = tl.where(factor == 0.0, 0.0, factor * (spread + total * (finite(m) - finite(top))))
    p_partials += row * 4 * splits + split
    tl.store(p_partials, top)
    tl.store(p_partials + splits, tl.sum(total * factor, 0))
    tl.store(p_partials + 2 * splits, tl.sum(spread, 0))
    tl.store(p_partials + 3 * splits, tl.sum(in_bias * factor, 0))


@triton.jit(do_not_specialize=["splits", "tiles"])
def softmax_rows_finish_kernel(
    p_partials,
    p_x,  # [R, V] float32
    p_bias,
    p_correct,
    p_wrong,
    p_log_sum,  # [R] float64
    p_total,  # [R] float64: L
    p_spread,  # [R] float64: A
    p_in_bias,  # [R] float64: B
    p_weights,  # [R, V] of W's dtype; may be p_x
    V,
    splits,
    tiles,
    logit_scale,
    EXCLUDE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    scale = logit_scale * LOG2E
    i = tl.arange(0, MAX_SPLITS)
    here = i < splits
    p_partials += row * 4 * splits + i
    m = tl.load(p_partials, mask=here, other=float("-inf"))
    top = tl.max(m, 0)
    factor = tl.exp2((m - finite(top)) * scale)
    sums = tl.load(p_partials + splits, mask=here, other=0.0)
    spreads = tl.load(p_partials + 2 * splits, mask=here, other=0.0) + sums * (finite(m) - finite(top))
    total = tl.sum(sums * factor, 0)
    spread = tl.sum(tl.where(factor == 0.0, 0.0, factor * spreads), 0)
    in_bias = tl.sum(tl.load(p_partials + 3 * splits, mask=here, other=0.0) * factor, 0)
    poison = tl.zeros([], tl.float32)
    c = row
    w = row
    if p_correct is not None:  # an id out of range: the row is NaN
        c = tl.load(p_correct + row)
        w = tl.load(p_wrong + row)
        poison = tl.where(_both_inside(c, w, V), 0.0, float("nan"))
    if split == 0:
        log_sum = top.to(tl.float64) * logit_scale + LN2 * tl.log2(total.to(tl.float64))
        tl.store(p_log_sum + row, log_sum + poison)
        tl.store(p_total + row, total.to(tl.float64) + poison)
        tl.store(p_spread + row, spread.to(tl.float64) * logit_scale + poison)
        tl.store(p_in_bias + row, in_bias.to(tl.float64) + poison)
    p_x += row_start(row, V, VECTOR, SHIFTED)
    p_weights += row_start(row, V, VECTOR, SHIFTED)
    shift = row_shift(row, V, VECTOR, SHIFTED)
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    for j in range(tiles):
        tile = split * tiles + tiles - 1 - j  # what was read last lies in L2
        b_z, _ = _tile(p_x, p_bias, c, w, V, shift, tile, EXCLUDE, UNROLL, LANES, VECTOR)
        b_e = (tl.exp2((b_z - finite(top)) * scale) + poison).to(p_weights.dtype.element_ty)
        first = tile * TILE - shift
        positions = tile_positions(UNROLL, LANES, VECTOR)
        if (first >= 0) & (first + TILE <= V):
            tl.store(p_weights + tile * TILE + positions, b_e)
        else:
            columns = first + positions
            tl.store(p_weights + tile * TILE + positions, b_e, mask=(columns >= 0) & (columns < V))


def _softmax_rows(
    products: Tensor,
    bias: Tensor | None,
    correct: Tensor | None,
    wrong: Tensor | None,
    exclude_answers: bool,
    logit_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_softmax.SoftmaxRows` in two launches; float32 weights overwrite the products."""
    R, V = products.shape
    device = products.device
    log_sum, total, spread, in_bias = (torch.empty(R, dtype=torch.float64, device=device) for _ in range(4))
    answers = torch.empty((0 if correct is None else R, 2), dtype=torch.float32, device=device)
    weights = products if dtype == products.dtype else torch.empty((R, V), dtype=dtype, device=device)
    if R == 0:
        return log_sum, weights, total, spread, in_bias, answers
    tiling = Tiling.of(R, V, products.dtype, (V,), processors(device))
    partials = torch.empty((R, 4, tiling.splits), dtype=torch.float32, device=device)
    exclude = exclude_answers and correct is not None
    with on_device_of(products):
        softmax_rows_scan_kernel[(R * tiling.splits,)](
            partials, products, bias, correct, wrong, None if correct is None else answers, V, tiling.splits,
            tiling.tiles, logit_scale, EXCLUDE=exclude, **tiling.constants,
        )  # fmt: skip
        softmax_rows_finish_kernel[(R * tiling.splits,)](
            partials, products, bias, correct, wrong, log_sum, total, spread, in_bias, weights, V, tiling.splits,
            tiling.tiles, logit_scale, EXCLUDE=exclude, **tiling.constants,
        )  # fmt: skip
    return log_sum, weights, total, spread, in_bias, answers


def linear_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correct: Tensor | None,
    wrong: Tensor | None,
    exclude_answers: bool,
    logit_scale: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_sum, mean, mean_bias, answers); see `interface.BackendModule`."""
    return in_chunks(hidden, weight, bias, correct, wrong, exclude_answers, logit_scale, chunk_bytes, _softmax_rows)
