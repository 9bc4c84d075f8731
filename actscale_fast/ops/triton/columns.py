"""How the loss kernels walk over the columns of a row of logits: one closed form, one way to address.

A row is cut into tiles of UNROLL × LANES × VECTOR columns: VECTOR columns make 16 bytes, LANES is the number of
threads, so a thread owns UNROLL vectors and whatever is reduced over the first and last axis stays in its registers.

Rows of odd width (V = 50257 in bf16) start off the 16-byte grid. Where all tensors of a launch are off by the same
amount, tiles are laid on the grid instead and the first one begins up to VECTOR − 1 columns before the row; those are
masked like the ones behind the row's end. Only such tiles are masked: a mask per column breaks 16-byte accesses up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import OPTIONS, ceil_div

#: Columns that a thread holds of each tensor: two to four 16-byte loads. Chosen by reasoning, see benchmarks/README.md.
PER_THREAD = 16
#: Programs a multiprocessor should have; four blocks of 128 threads and at most 128 registers fit at once.
PROGRAMS_PER_PROCESSOR = 4
THREADS_PER_WARP = 32
MAX_SPLITS = tl.constexpr(128)


@dataclass(frozen=True)
class Tiling:
    """The launch of one kernel over [rows, columns]: `rows · splits` programs of `tiles` tiles each."""

    unroll: int
    lanes: int
    vector: int
    shifted: bool  # tiles lie on the 16-byte grid of rows that do not
    splits: int  # programs per row
    tiles: int  # tiles per program
    warps: int

    @staticmethod
    def of(rows: int, columns: int, dtype: torch.dtype, strides: tuple[int, ...], multiprocessors: int) -> Tiling:
        """As many programs per row as fill the chip; rows that fill it alone get one program of twice the threads."""
        vector = 16 // dtype.itemsize
        alone = rows >= PROGRAMS_PER_PROCESSOR * multiprocessors
        warps = 8 if alone else 4
        lanes = THREADS_PER_WARP * warps
        shifted = any(s % vector for s in strides) and len({s % vector for s in strides}) == 1
        count = max(ceil_div(columns + (vector - 1 if shifted else 0), lanes * PER_THREAD), 1)
        wanted = 1 if alone else ceil_div(PROGRAMS_PER_PROCESSOR * multiprocessors, max(rows, 1))
        tiles = ceil_div(count, min(wanted, count, MAX_SPLITS.value))
        return Tiling(PER_THREAD // vector, lanes, vector, shifted, ceil_div(count, tiles), tiles, warps)

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' keyword arguments of these names."""
        return {
            "UNROLL": self.unroll, "LANES": self.lanes, "VECTOR": self.vector,
            "SHIFTED": int(self.shifted), "num_warps": self.warps, **OPTIONS,
        }  # fmt: skip


@triton.jit
def tile_positions(UNROLL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Positions in a tile, [UNROLL, LANES, VECTOR]."""
    unroll = tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
    return unroll + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def row_start(row, stride, VECTOR: tl.constexpr, SHIFTED: tl.constexpr):
    """The offset at which the row's first tile begins; `stride` elements lie between rows. `row` is int64."""
    if SHIFTED:
        return row * stride // VECTOR * VECTOR
    else:  # noqa: RET505  (Triton wants both branches of a constexpr)
        return row * stride


@triton.jit
def row_shift(row, stride, VECTOR: tl.constexpr, SHIFTED: tl.constexpr):
    """How many columns before the row its first tile begins."""
    if SHIFTED:
        return (row * stride % VECTOR).to(tl.int32)
    else:  # noqa: RET505
        return 0


@triton.jit
def in_tile(column, first, TILE: tl.constexpr):
    return (column >= first) & (column < first + TILE)
