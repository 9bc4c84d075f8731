"""Two softmaxes over the same columns, in one pass: the sums of a KL divergence, and its gradient.

w are the logits of the weighting distribution (the reference's; the intervened ones in reverse), o the other ones, i
the inverse temperature, M the maxima of a row:
    KL = i·A/L_w + log(L_o/L_w),   A = Σ e^{i(w−M_w)}·((w−M_w) − (o−M_o)),   L = Σ e^{i(·−M)}
A, L and M are found in one pass (running maxima, as arXiv 1805.02867 does for one softmax); moving the maxima by
δ = (m_w−M_w) − (m_o−M_o) turns a partial sum a into e^{i(m_w−M_w)}·(a + l_w·δ). Only differences from the maxima are
ever multiplied or added up, so a common offset costs no digits; equal rows give δ = 0, A = 0 and L_o = L_w, a KL of
exactly 0. The gradient takes q and p from e^{i(·−M) − log L}, the sum inside the exponent, so equal rows subtract equal
numbers; a product with 1/L would be contracted into the subtraction and leave a rounding error.

With a soft-cap the logits are u = s·tanh(v/s) of those in memory, and the gradient takes du/dv = 1 − tanh²(v/s) as a
factor. With e = 2^x, x = 2·log₂(e)·v/s: tanh = (e − 1)/(e + 1) and 1 − tanh² = 4e/(e + 1)². e − 1 comes from the
polynomial of 2^f, |f| ≤ ½, without its 1, so that small logits keep their digits; no difference of
ones is taken for the slope.

A is kept in units of 2²⁴, so that no sum of finite differences overflows: a token that one side masks with the least
float is 3e38 away from what the other side says. −inf on both sides weighs nothing and adds nothing; −inf in o alone
makes A infinite where the weight is positive.
Nothing is saved. Per pair of logits: 2·b bytes and two 2^x, and two more 2^x per thread and tile of 16 pairs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .columns import in_tile, tile_positions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SHRINK = tl.constexpr(2.0**-24)  # of A
GROWTH = tl.constexpr(2.0**24)
ROUNDER = tl.constexpr(12582912.0)  # 1.5·2²³: a float32 beside it has no digits behind the point
ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0


@triton.jit
def capped(b_v, softcap):
    """(softcap·tanh(v/softcap), its slope). Beyond |x| = 64 tanh is 1 and the slope below 3e-19; NaN stays."""
    b_x = b_v * (2.0 * LOG2E / softcap)
    b_x = tl.where(b_x > 64.0, 64.0, tl.where(b_x < -64.0, -64.0, b_x))
    b_shifted = b_x + ROUNDER  # its lowest bits are x rounded
    b_f = b_x - (b_shifted - ROUNDER)
    b_power = ((b_shifted.to(tl.int32, bitcast=True) << 23) + ONE_BITS).to(tl.float32, bitcast=True)
    b_q = tl.fma(b_f, 1.5469732e-4, 1.3410001e-3)
    b_q = tl.fma(b_f, b_q, 9.618031e-3)
    b_q = tl.fma(b_f, b_q, 5.5502973e-2)
    b_q = tl.fma(b_f, b_q, 2.402265e-1)
    b_part = b_f * tl.fma(b_f, b_q, 6.9314724e-1)  # 2^f − 1
    b_less_one = tl.fma(b_power, b_part, b_power - 1.0)
    b_inverse = 1.0 / (b_less_one + 2.0)
    return b_less_one * b_inverse * softcap, 4.0 * tl.fma(b_power, b_part, b_power) * b_inverse * b_inverse


@triton.jit
def finite(m):
    """A maximum that may be subtracted: 0 stands for that of nothing but −inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _moved(m_w, l_w, m_o, a, top_w, top_o, scale):
    """(factor of l_w, a) of a partial sum whose maxima m become `top`; where the factor underflows, a is 0 even if it
    was infinite."""
    factor = tl.exp2((m_w - finite(top_w)) * scale)
    delta = ((finite(m_w) - finite(top_w)) - (finite(m_o) - finite(top_o))) * SHRINK
    delta = tl.where(m_o == float("-inf"), 0.0, delta)  # A is infinite, or nothing has been weighed
    return factor, tl.where(factor == 0.0, 0.0, factor * (a + l_w * delta))


@triton.jit
def merge(m_w, l_w, m_o, l_o, a, scale):
    """Partial sums [K] -> the sums over all K, as scalars."""
    top_w, top_o = tl.max(m_w, 0), tl.max(m_o, 0)
    factor, a = _moved(m_w, l_w, m_o, a, top_w, top_o, scale)
    sum_o = tl.sum(l_o * tl.exp2((m_o - finite(top_o)) * scale), 0)
    return top_w, tl.sum(l_w * factor, 0), top_o, sum_o, tl.sum(a, 0)


@triton.jit
def scan(
    p_w,  # where the row's first tile begins
    p_o,
    c,
    w,
    V,
    shift,  # columns before the row at which its first tile begins
    first_tile,
    tiles,
    scale,
    softcap,
    EXCLUDE: tl.constexpr,
    CAPPED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """(M_w, L_w, M_o, L_o, A/2²⁴) of some tiles; a running set per thread, so the loop reduces in registers only."""
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    positions = tile_positions(UNROLL, LANES, VECTOR)
    m_w = tl.full([LANES], float("-inf"), tl.float32)
    m_o = tl.full([LANES], float("-inf"), tl.float32)
    l_w = tl.zeros([LANES], tl.float32)
    l_o = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    for tile in range(first_tile, first_tile + tiles):
        first = tile * TILE - shift
        whole = (first >= 0) & (first + TILE <= V)
        if EXCLUDE:
            whole = whole & ((in_tile(c, first, TILE) | in_tile(w, first, TILE)) == 0)
        offsets = tile * TILE + positions
        if whole:
            b_w = tl.load(p_w + offsets).to(tl.float32)
            b_o = tl.load(p_o + offsets).to(tl.float32)
        else:
            columns = first + positions
            kept = (columns >= 0) & (columns < V)
            if EXCLUDE:
                kept = kept & (columns != c) & (columns != w)
            b_w = tl.load(p_w + offsets, mask=kept, other=float("-inf")).to(tl.float32)
            b_o = tl.load(p_o + offsets, mask=kept, other=float("-inf")).to(tl.float32)
        if CAPPED:  # what is beyond the row's ends stays −inf
            b_w, _ = capped(b_w, softcap)
            b_o, _ = capped(b_o, softcap)
            inside = (first + positions >= 0) & (first + positions < V)
            b_w = tl.where(inside, b_w, float("-inf"))
            b_o = tl.where(inside, b_o, float("-inf"))
        top_w = tl.maximum(m_w, tl.max(tl.max(b_w, 2), 0))
        top_o = tl.maximum(m_o, tl.max(tl.max(b_o, 2), 0))
        b_w -= finite(top_w)[None, :, None]
        b_o -= finite(top_o)[None, :, None]
        b_e = tl.exp2(b_w * scale)
        factor, a = _moved(m_w, l_w, m_o, a, top_w, top_o, scale)
        a += tl.sum(tl.sum(tl.where(b_e == 0.0, 0.0, b_e * ((b_w - b_o) * SHRINK)), 2), 0)
        l_w = tl.fma(l_w, factor, tl.sum(tl.sum(b_e, 2), 0))
        factor = tl.exp2((m_o - finite(top_o)) * scale)
        l_o = tl.fma(l_o, factor, tl.sum(tl.sum(tl.exp2(b_o * scale), 2), 0))
        m_w, m_o = top_w, top_o
    return merge(m_w, l_w, m_o, l_o, a, scale)


@triton.jit
def kl_gradient(
    b_w, b_o, top_w, log_w, top_o, log_o, faithfulness, scale, softcap, factor, REVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dF/dz of columns whose logits are b_w and b_o, times factor over the inverse temperature; log_w, log_o are the
    logarithms to base 2 of L_w, L_o."""
    if CAPPED:
        b_w, b_slope_w = capped(b_w, softcap)
        b_o, b_slope_o = capped(b_o, softcap)
        if REVERSE:
            factor = factor * b_slope_w
        else:
            factor = factor * b_slope_o
    b_w -= finite(top_w)
    b_o -= finite(top_o)
    b_q = tl.exp2(b_w * scale - log_w)
    if REVERSE:  # in nats: to base 2, differences of 3e38 would overflow
        b_ratio = (b_w - b_o) * (scale * LN2) - (log_w - log_o) * LN2
        return tl.where(b_q == 0.0, 0.0, factor * b_q * (b_ratio - faithfulness))
    else:  # noqa: RET505  (Triton wants both branches of a constexpr)
        return factor * (tl.exp2(b_o * scale - log_o) - b_q)
