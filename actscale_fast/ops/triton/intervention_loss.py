"""Effectiveness and faithfulness of an intervention, and the gradient of both, from two rows of logits.

z the logits, r the reference logits, i = inverse temperature, q = softmax(i·z), p = softmax(i·r) over the columns that
are kept (all, or all but the answers c and w), s = ±1 the direction:
    effectiveness E = max(0, m − s·(z[c] − z[w]))              dE/dz[c] = −s where E > 0, dE/dz[w] = s where E > 0
    faithfulness  F = Σ p (log p − log q)                      dF/dz = i·(q − p)
                  F = Σ q (log q − log p)   (reverse)          dF/dz = i·q·(log q − log p − F)
The sums behind F and dF/dz are those of softmaxes.py. With answers on request: weights w_E, w_F of rows in the gradient
alone, which becomes that of w_E·E + w_F·F. Without answers on request: weights of rows, w·F and w·dF/dz, and
a soft-cap of both sides' logits. A row of weight 0 is not read, its gradient is written as zeros.

Nothing is saved for backward but the gradient itself and three numbers per row. Bytes per logit of b bytes: 2·b for the
losses; with the gradient 5·b, of which up to 2·b come from L2: the second pass walks over rows and columns backwards.

Rows are split over programs (`Tiling`); each stores the five sums of its columns, and every program of the second
launch combines the row's few partials again, in order, rather than wait for a third one. Where the rows alone fill the
chip, one launch does both passes. The scalars' ‖α‖₁ and sign(α) are one more program of the last launch. Launch
constants not measured on a GPU yet; see columns.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import outputs
from ..interface import LossArguments
from .columns import MAX_SPLITS, Tiling, in_tile, row_shift, row_start, tile_positions
from .device import on_device_of, processors
from .softmaxes import GROWTH, LN2, LOG2E, kl_gradient, merge, scan

SCALARS_BLOCK = tl.constexpr(1024)


@triton.jit
def _answers(p_correct, p_wrong, row, V):
    """(c, w, whether both are columns); −1 for both where one is not, or where there are no answers."""
    if p_correct is not None:
        c = tl.load(p_correct + row)
        w = tl.load(p_wrong + row)
        valid = (c >= 0) & (c < V) & (w >= 0) & (w < V)
        return tl.where(valid, c, -1).to(tl.int32), tl.where(valid, w, -1).to(tl.int32), valid
    else:  # noqa: RET505  (Triton wants both branches of a constexpr)
        nowhere = tl.full([], -1, tl.int32)
        return nowhere, nowhere, nowhere == -1


@triton.jit
def _answer_logits(p_w, p_o, c, w):
    """(w[c], w[w], o[c], o[w]), NaN where the answers are not columns."""
    valid = c >= 0
    w_c = tl.load(p_w + c, mask=valid, other=float("nan")).to(tl.float32)
    w_w = tl.load(p_w + w, mask=valid, other=float("nan")).to(tl.float32)
    o_c = tl.load(p_o + c, mask=valid, other=float("nan")).to(tl.float32)
    o_w = tl.load(p_o + w, mask=valid, other=float("nan")).to(tl.float32)
    return w_c, w_w, o_c, o_w


@triton.jit
def _l1_and_sign(p_scalars, p_l1, p_sign, n_scalars):
    total = tl.zeros([SCALARS_BLOCK], tl.float32)
    for start in range(0, n_scalars, SCALARS_BLOCK):
        i = start + tl.arange(0, SCALARS_BLOCK)
        b_alpha = tl.load(p_scalars + i, mask=i < n_scalars, other=0.0)
        total += tl.abs(b_alpha)
        if p_sign is not None:
            tl.store(p_sign + i, (b_alpha > 0).to(tl.float32) - (b_alpha < 0).to(tl.float32), mask=i < n_scalars)
    tl.store(p_l1, tl.sum(total, 0))


@triton.jit(do_not_specialize=["splits", "tiles"])
def intervention_loss_scan_kernel(
    p_partials,  # [N, 5, splits]: M_w, L_w, M_o, L_o, A/2²⁴
    p_answers,  # [N, 4] or None: w[c], w[w], o[c], o[w], before a gradient in place overwrites them
    p_w,  # [N, V] the weighting distribution's logits
    p_o,  # [N, V] the other ones
    p_correct,  # [N] or None
    p_wrong,
    p_weight,  # [N] or None
    V,
    stride_w,
    stride_o,
    splits,
    tiles,
    inverse_temperature,
    softcap,
    EXCLUDE: tl.constexpr,
    CAPPED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if p_weight is not None:  # noqa: SIM102  (known when compiled; the other when run)
        if tl.load(p_weight + row) == 0.0:
            return
    c, w, _ = _answers(p_correct, p_wrong, row, V)
    top_w, sum_w, top_o, sum_o, a = scan(
        p_w + row_start(row, stride_w, VECTOR, SHIFTED), p_o + row_start(row, stride_o, VECTOR, SHIFTED), c, w, V,
        row_shift(row, stride_w, VECTOR, SHIFTED), split * tiles, tiles, inverse_temperature * LOG2E, softcap,
        EXCLUDE, CAPPED, UNROLL, LANES, VECTOR,
    )  # fmt: skip
    if p_correct is not None:  # noqa: SIM102  (known when compiled; the other when run)
        if split == 0:
            w_c, w_w, o_c, o_w = _answer_logits(p_w + row * stride_w, p_o + row * stride_o, c, w)
            p_answers += row * 4
            tl.store(p_answers, w_c)
            tl.store(p_answers + 1, w_w)
            tl.store(p_answers + 2, o_c)
            tl.store(p_answers + 3, o_w)
    p_partials += row * 5 * splits + split
    tl.store(p_partials, top_w)
    tl.store(p_partials + splits, sum_w)
    tl.store(p_partials + 2 * splits, top_o)
    tl.store(p_partials + 3 * splits, sum_o)
    tl.store(p_partials + 4 * splits, a)


@triton.jit
def _partials(p_partials, row, splits, scale):
    """The row's sums from those of its splits, combined in the same order by whoever asks."""
    i = tl.arange(0, MAX_SPLITS)
    here = i < splits
    p_partials += row * 5 * splits + i
    m_w = tl.load(p_partials, mask=here, other=float("-inf"))
    l_w = tl.load(p_partials + splits, mask=here, other=0.0)
    m_o = tl.load(p_partials + 2 * splits, mask=here, other=float("-inf"))
    l_o = tl.load(p_partials + 3 * splits, mask=here, other=0.0)
    a = tl.load(p_partials + 4 * splits, mask=here, other=0.0)
    return merge(m_w, l_w, m_o, l_o, a, scale)


@triton.jit
def _write_zeros(
    p_grad, row, V, first_tile, tiles, UNROLL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    positions = tile_positions(UNROLL, LANES, VECTOR)
    shift = row_shift(row, V, VECTOR, SHIFTED)
    p_grad += row_start(row, V, VECTOR, SHIFTED)
    b_zero = tl.zeros([UNROLL, LANES, VECTOR], p_grad.dtype.element_ty)
    for tile in range(first_tile, first_tile + tiles):
        columns = tile * TILE - shift + positions
        if (tile * TILE >= shift) & (tile * TILE - shift + TILE <= V):
            tl.store(p_grad + tile * TILE + positions, b_zero)
        else:
            tl.store(p_grad + tile * TILE + positions, b_zero, mask=(columns >= 0) & (columns < V))


@triton.jit(do_not_specialize=["n_scalars", "splits", "programs", "tiles"])
def intervention_loss_finish_kernel(
    p_partials,  # of the scan kernel, or None: the program scans its row itself (programs == 1)
    p_answers,  # of the scan kernel, with p_partials
    p_w,  # [N, V]
    p_o,  # [N, V]
    p_correct,  # [N] or None
    p_wrong,
    p_direction,  # [N] or None
    p_weight,  # [N] or None
    p_gradient_weight,  # [N, 2] or None: w_E, w_F
    p_effectiveness,  # [N]
    p_faithfulness,  # [N]
    p_grad,  # [N, V] or None; may be p_o or p_w
    p_answer_grad,  # [N, 3] or None
    p_scalars,  # or None
    p_l1,
    p_sign,
    n_scalars,
    V,
    stride_w,
    stride_o,
    splits,
    programs,  # a row
    tiles,  # a program
    margin,
    inverse_temperature,
    softcap,
    EXCLUDE: tl.constexpr,
    CAPPED: tl.constexpr,
    NOTHING_LEFT: tl.constexpr,  # V = 0, or V ≤ 2 without the answers: F = 0
    REVERSE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what the scan read last lies in L2
    if p_scalars is not None:
        if program == 0:
            _l1_and_sign(p_scalars, p_l1, p_sign, n_scalars)
            return
        program -= 1
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    row = (program // programs).to(tl.int64)
    split = program % programs
    scale = inverse_temperature * LOG2E
    factor = inverse_temperature
    if p_weight is not None:
        weight = tl.load(p_weight + row)
        factor = factor * weight
        if weight == 0.0:
            if split == 0:
                tl.store(p_effectiveness + row, 0.0)
                tl.store(p_faithfulness + row, 0.0)
                if p_answer_grad is not None:
                    tl.store(
                        p_answer_grad + row * 3 + tl.arange(0, 4), tl.zeros([4], tl.float32), mask=tl.arange(0, 4) < 3
                    )
            if p_grad is not None:
                _write_zeros(p_grad, row, V, split * tiles, tiles, UNROLL, LANES, VECTOR, SHIFTED)
            return
    if p_gradient_weight is not None:
        factor = factor * tl.load(p_gradient_weight + 2 * row + 1)
    c, w, valid = _answers(p_correct, p_wrong, row, V)
    p_first = p_w + row * stride_w
    p_second = p_o + row * stride_o
    p_w += row_start(row, stride_w, VECTOR, SHIFTED)
    p_o += row_start(row, stride_o, VECTOR, SHIFTED)
    shift = row_shift(row, stride_w, VECTOR, SHIFTED)

    if p_partials is not None:
        if p_correct is not None:
            p_answers += row * 4
            w_c, w_w = tl.load(p_answers), tl.load(p_answers + 1)
            o_c, o_w = tl.load(p_answers + 2), tl.load(p_answers + 3)
        top_w, sum_w, top_o, sum_o, a = _partials(p_partials, row, splits, scale)
    else:
        if p_correct is not None:  # before the scan, whose reductions all warps end before one may overwrite them
            w_c, w_w, o_c, o_w = _answer_logits(p_first, p_second, c, w)
        top_w, sum_w, top_o, sum_o, a = scan(
            p_w, p_o, c, w, V, shift, 0, tiles, scale, softcap, EXCLUDE, CAPPED, UNROLL, LANES, VECTOR
        )  # fmt: skip
    log_w, log_o = tl.log2(sum_w), tl.log2(sum_o)
    faithfulness = inverse_temperature * (a / sum_w * GROWTH) + LN2 * tl.log2(sum_o / sum_w)
    faithfulness = tl.where(faithfulness < 0.0, 0.0, faithfulness)  # rounding; NaN stays
    if NOTHING_LEFT:
        faithfulness = 0.0 * inverse_temperature
        log_w, log_o = float("inf") + faithfulness, float("inf") + faithfulness
    if p_correct is not None:  # an id out of range: the row is NaN
        poison = tl.where(valid, 0.0, float("nan"))
        faithfulness += poison
        log_w += poison
        log_o += poison

    if p_correct is not None:
        direction = tl.load(p_direction + row)
        if REVERSE:
            difference = w_c - w_w
        else:
            difference = o_c - o_w
        missing = margin - direction * difference
        effectiveness = tl.where(missing <= 0.0, 0.0, missing)
        slope = -direction
        if p_gradient_weight is not None:
            slope = slope * tl.load(p_gradient_weight + 2 * row)
        hinge = tl.where((missing > 0.0) & (c != w), slope, 0.0) + poison
    else:
        effectiveness = tl.zeros([], tl.float32)

    if split == 0:
        tl.store(p_effectiveness + row, effectiveness)
        if p_weight is not None:
            tl.store(p_faithfulness + row, weight * faithfulness)
        else:
            tl.store(p_faithfulness + row, faithfulness)
        if p_answer_grad is not None:
            p_answer_grad += row * 3
            if p_correct is None:
                tl.store(p_answer_grad + tl.arange(0, 4), tl.zeros([4], tl.float32), mask=tl.arange(0, 4) < 3)
            else:
                if EXCLUDE:
                    at_c, at_w = poison, poison
                else:
                    at_c = kl_gradient(
                        w_c, o_c, top_w, log_w, top_o, log_o, faithfulness, scale, softcap, factor, REVERSE, CAPPED
                    )
                    at_w = kl_gradient(
                        w_w, o_w, top_w, log_w, top_o, log_o, faithfulness, scale, softcap, factor, REVERSE, CAPPED
                    )
                tl.store(p_answer_grad, at_c)
                tl.store(p_answer_grad + 1, at_w)
                tl.store(p_answer_grad + 2, hinge)

    if p_grad is not None:
        positions = tile_positions(UNROLL, LANES, VECTOR)
        p_grad += row_start(row, V, VECTOR, SHIFTED)
        for i in range(tiles):
            tile = split * tiles + tiles - 1 - i
            first = tile * TILE - shift
            whole = (first >= 0) & (first + TILE <= V)
            if p_correct is not None:
                whole = whole & ((in_tile(c, first, TILE) | in_tile(w, first, TILE)) == 0)
            offsets = tile * TILE + positions
            if whole:
                b_w = tl.load(p_w + offsets).to(tl.float32)
                b_o = tl.load(p_o + offsets).to(tl.float32)
                b_g = kl_gradient(
                    b_w, b_o, top_w, log_w, top_o, log_o, faithfulness, scale, softcap, factor, REVERSE, CAPPED
                )
                tl.store(p_grad + offsets, b_g.to(p_grad.dtype.element_ty))
            else:
                columns = first + positions
                here = (columns >= 0) & (columns < V)
                b_w = tl.load(p_w + offsets, mask=here, other=float("-inf")).to(tl.float32)
                b_o = tl.load(p_o + offsets, mask=here, other=float("-inf")).to(tl.float32)
                b_g = kl_gradient(
                    b_w, b_o, top_w, log_w, top_o, log_o, faithfulness, scale, softcap, factor, REVERSE, CAPPED
                )
                if p_correct is not None:
                    if EXCLUDE:
                        b_g = tl.where((columns == c) | (columns == w), 0.0, b_g)
                    b_g += tl.where(columns == c, hinge, 0.0) - tl.where(columns == w, hinge, 0.0)
                tl.store(p_grad + offsets, b_g.to(p_grad.dtype.element_ty), mask=here)


def intervention_loss(*arguments: Any, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, grad, answer_grad, l1, sign); see `interface.BackendModule`."""
    call = LossArguments(*arguments)
    logits, reference_logits, scalars = call.logits, call.reference_logits, call.scalars
    correct, wrong, row_weight, need_grad = call.correct, call.wrong, call.row_weight, call.need_grad
    softcap = call.softcap or 0.0
    N, V = logits.shape
    device = logits.device
    results = outputs.intervention_loss(logits, scalars, need_grad, logits.detach() if in_place else None)
    effectiveness, faithfulness, grad, answer_grad, l1, sign = results
    exclude = call.exclude_answers and correct is not None
    p_w, p_o = (logits, reference_logits) if call.reverse else (reference_logits, logits)
    strides = (p_w.stride(0), p_o.stride(0), *((V,) if need_grad else ()))
    tiling = Tiling.of(N, V, logits.dtype, strides, processors(device))
    partials = answers = None
    with on_device_of(logits):
        if tiling.splits > 1 and N > 0:
            partials = torch.empty((N, 5, tiling.splits), dtype=torch.float32, device=device)
            answers = torch.empty((N, 4), dtype=torch.float32, device=device) if correct is not None else None
            intervention_loss_scan_kernel[(N * tiling.splits,)](
                partials, answers, p_w, p_o, correct, wrong, row_weight, V, *strides[:2], tiling.splits, tiling.tiles,
                call.inverse_temperature, softcap, EXCLUDE=exclude, CAPPED=call.softcap is not None, **tiling.constants,
            )  # fmt: skip
        programs = tiling.splits if need_grad else 1  # without a gradient only the combination is left to do
        grid = N * programs + (scalars is not None)
        if grid > 0:
            intervention_loss_finish_kernel[(grid,)](
                partials, answers, p_w, p_o, correct, wrong, call.direction, row_weight, call.gradient_weight,
                effectiveness, faithfulness, grad if need_grad else None, answer_grad if need_grad else None,
                scalars, l1 if scalars is not None else None, sign if scalars is not None and need_grad else None,
                0 if scalars is None else scalars.numel(), V, *strides[:2], tiling.splits, programs, tiling.tiles,
                call.margin, call.inverse_temperature, softcap, EXCLUDE=exclude, CAPPED=call.softcap is not None,
                NOTHING_LEFT=V == 0 or (exclude and V <= 2), REVERSE=call.reverse, **tiling.constants,
            )  # fmt: skip
    return results
