"""Sums of partial sums over each group's rows in a fixed order: the backwards of scale_heads and dynamic_scale.

    out[g, p, n] = Σ_{b in g} Σ_c partial[b, p, c, n]
Rows (b, c) are added block by block in order, by a fixed tree within a block. Bytes: 4 per partial sum, read
once; the partials are a few per cent of the activation, so this kernel is mostly its launch.
Launch constants not measured on a GPU yet: a tile of 2048 float32 is 16 registers per thread.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import OPTIONS, ceil_div

REDUCE_TILE = 2048
WARPS = 4


@triton.jit(do_not_specialize=["B", "C", "G", "P"])
def sum_groups_kernel(
    p_out,  # [G, P, N]
    p_partial,  # [B, P, C, N]
    p_group,  # [B] or None: every row where G == 1, else row g
    B,
    C,
    N,
    G,
    P,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g = tl.program_id(0) // P
    p = tl.program_id(0) % P
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.zeros([], tl.int32)
    end = B * C + start  # fewer than the programs that made them: int32, whose division is cheap
    if p_group is None:
        start = tl.where(G > 1, g * C, start)
        end = tl.where(G > 1, start + C, end)
    total = tl.zeros([BLOCK_N], tl.float32)
    for block in range(start, end, BLOCK_R):
        r = block + tl.arange(0, BLOCK_R)
        b = r // C
        mine = r < end
        if p_group is not None:
            mine = mine & (tl.load(p_group + b, mask=mine, other=-1) == g)
        offsets = ((b.to(tl.int64) * P + p) * C + r % C) * N
        mask = mine[:, None] & (n < N)[None, :]
        total += tl.sum(tl.load(p_partial + offsets[:, None] + n[None, :], mask=mask, other=0.0), 0)
    tl.store(p_out + tl.program_id(0).to(tl.int64) * N + n, total, mask=n < N)


def sum_groups(out: Tensor, partial: Tensor, group: Tensor | None) -> None:
    """[B, P, C, N] summed over each group's rows and over C, into `out` [G, P, ...]."""
    B, P, C, N = partial.shape
    G = out.shape[0]
    columns = min(triton.next_power_of_2(N), 128)
    sum_groups_kernel[G * P, ceil_div(N, columns)](
        out, partial, group, B, C, N, G, P,
        BLOCK_R=min(triton.next_power_of_2(B * C), REDUCE_TILE // columns), BLOCK_N=columns, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
