"""The backward pass of the losses: turns their saved gradient, of an upstream of 1, into that of the given upstream.

With dE, dF a row's upstream factors and a its three answer gradients (`interface.BackendModule.intervention_loss`):
    grad[v] ← dF·grad[v]                       for v not an answer
    grad[c] ← dF·a[0] + dE·a[2]
    grad[w] ← dF·a[1] − dE·a[2]                both in float32 before rounding
The factors are read on the device. Rows whose two factors are 1 return at once (the usual case of a summed loss), rows
with dF = 1 rewrite only the tiles of their answers. Bytes per logit of b bytes: 2·b, or nothing. Launch constants not
measured on a GPU yet; see columns.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .columns import Tiling, in_tile, row_shift, row_start, tile_positions
from .device import on_device_of, processors


@triton.jit(do_not_specialize=["splits", "tiles"])
def intervention_loss_scale_kernel(
    p_grad,  # [N, V]
    p_effectiveness,  # [N] upstream
    p_faithfulness,  # [N] upstream
    p_correct,  # [N] or None
    p_wrong,
    p_answer_grad,  # [N, 3]
    V,
    stride_e,
    stride_f,
    splits,
    tiles,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    d_e = tl.load(p_effectiveness + row * stride_e)
    d_f = tl.load(p_faithfulness + row * stride_f)
    if (d_e == 1.0) & (d_f == 1.0):
        return
    positions = tile_positions(UNROLL, LANES, VECTOR)
    shift = row_shift(row, V, VECTOR, SHIFTED)
    p_grad += row_start(row, V, VECTOR, SHIFTED)
    if p_correct is not None:
        c = tl.load(p_correct + row)
        w = tl.load(p_wrong + row)
        hinge = d_e * tl.load(p_answer_grad + row * 3 + 2)
        at_c = d_f * tl.load(p_answer_grad + row * 3) + hinge
        at_w = d_f * tl.load(p_answer_grad + row * 3 + 1) - hinge
    for tile in range(split * tiles, split * tiles + tiles):
        first = tile * TILE - shift
        whole = (first >= 0) & (first + TILE <= V)
        touched = d_f != 1.0
        if p_correct is not None:
            answered = in_tile(c, first, TILE) | in_tile(w, first, TILE)
            whole = whole & (answered == 0)
            touched = touched | answered
        offsets = tile * TILE + positions
        if touched:
            if whole:
                b_g = d_f * tl.load(p_grad + offsets).to(tl.float32)
                tl.store(p_grad + offsets, b_g.to(p_grad.dtype.element_ty))
            else:
                columns = first + positions
                here = (columns >= 0) & (columns < V)
                b_g = d_f * tl.load(p_grad + offsets, mask=here, other=0.0).to(tl.float32)
                if p_correct is not None:
                    b_g = tl.where(columns == c, at_c, tl.where(columns == w, at_w, b_g))
                tl.store(p_grad + offsets, b_g.to(p_grad.dtype.element_ty), mask=here)


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    """Scales each row of `grad` in place; see `interface.BackendModule`."""
    N, V = grad.shape
    if N == 0:
        return
    tiling = Tiling.of(N, V, grad.dtype, (V,), processors(grad.device))
    with on_device_of(grad):
        intervention_loss_scale_kernel[(N * tiling.splits,)](
            grad, d_effectiveness, d_faithfulness, correct, wrong, answer_grad, V,
            d_effectiveness.stride(0), d_faithfulness.stride(0), tiling.splits, tiling.tiles, **tiling.constants,
        )  # fmt: skip
