"""The threads of thread-block clusters: who they are, which barriers they have passed, whose memory they name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .memory import RANK_AT, SHARED_WINDOW, SharedMemory
from .races import Indices, KernelError, Who

LANES = 32
#: The threads that run an instruction, ascending; None: all of them.
Active = Indices | None


def pick(values: NDArray, active: Active) -> NDArray:
    return values if active is None else values[active]


class Clusters:
    """Whole clusters of one launch, run together: thread t is thread t % threads of block t // threads.

    Args:
        first, count: the first cluster of the grid that runs here, and how many do; the grid is counted row by row.
        grid: blocks in x and y.
        threads: per block.
        size: blocks per cluster.
    """

    def __init__(self, first: int, count: int, grid: tuple[int, int], threads: int, size: int) -> None:
        self.threads, self.size, self.blocks = threads, size, count * size
        self.total = self.blocks * threads
        everyone = np.arange(self.total)
        self.block = everyone // threads
        self.thread = everyone % threads
        warps = -(-threads // LANES)
        self.lane = self.thread % LANES
        self.warp = self.block * warps + self.thread // LANES
        self.before = (first * size * warps, first * size)  # warps and blocks of the grid that ran earlier
        self.rank = self.block % size
        #: Of each block: the latest phase in which another block touched its memory, the earliest in which it ended.
        self.touched, self.ended = np.full(self.blocks, -1), np.full(self.blocks, np.iinfo(np.int64).max)
        in_grid = first * size + self.block
        self.done = np.zeros(self.total, np.bool_)
        #: Barriers of its block that a thread has come to; of its cluster, the two halves.
        self.passed, self.arrived, self.waited = (np.zeros(self.total, np.int64) for _ in range(3))
        self.special = {
            "%tid.x": self.thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": in_grid % grid[0], "%ctaid.y": in_grid // grid[0], "%ctaid.z": 0,
            "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": 1, "%laneid": self.lane,
            "%cluster_ctarank": self.rank, "%cluster_nctarank": size, "%cluster_ctaid.x": self.rank,
            "%cluster_nctaid.x": size, "%warpid": self.thread // LANES,
        }  # fmt: skip

    def who(self, active: Active) -> Who:
        """With warps and blocks counted over the whole grid."""
        warp, block = (pick(a, active) + b for a, b in zip((self.warp, self.block), self.before, strict=True))
        return Who(warp, block, *(pick(a, active) for a in (self.passed, self.arrived, self.waited)))

    def exit(self, active: Active) -> None:
        if (pick(self.arrived, active) != pick(self.waited, active)).any():
            raise KernelError("a thread ends between arriving at the cluster's barrier and waiting for it")
        block, waited = pick(self.block, active), pick(self.waited, active)
        if (waited <= self.touched[block]).any():
            raise KernelError(
                "a block ends while others may still touch its shared memory: no barrier of the cluster follows"
            )
        np.minimum.at(self.ended, block, waited)
        self.done[slice(None) if active is None else active] = True

    def reached(self, counts: Indices, group: int) -> Indices:
        """By thread: how often all threads of its block or cluster, `group` threads each, came to a barrier."""
        least = np.where(self.done, np.iinfo(np.int64).max, counts).reshape(-1, group).min(1)
        return np.repeat(least, group)

    def past_block_barrier(self, waiting: Indices) -> NDArray[np.bool_]:
        return self.passed[waiting] <= self.reached(self.passed, self.threads)[waiting]

    def past_cluster_barrier(self, waiting: Indices) -> NDArray[np.bool_]:
        return self.waited[waiting] <= self.reached(self.arrived, self.threads * self.size)[waiting]

    def in_whole_warps(self, waiting: Indices) -> NDArray[np.bool_]:
        """Whether all lanes of a thread's warp that are not done wait here."""
        here = self.done.copy()
        here[waiting] = True
        missing = np.bincount(self.warp[~here], minlength=int(self.warp[-1]) + 1)
        return missing[self.warp[waiting]] == 0

    def require_whole_warps(self, active: Active) -> None:
        """An exchange among lanes needs all of them: what a lane that is gone would hand over is not defined."""
        if (active is not None and len(active) % LANES) or self.threads % LANES:
            raise KernelError("lanes of the warp have ended, or the block ends within a warp")

    def shared_places(self, memory: SharedMemory, addresses: Indices, active: Active, width: int) -> Indices:
        """Of shared or generic addresses, which may name another block of the cluster."""
        inner = np.where(addresses >= SHARED_WINDOW, addresses - SHARED_WINDOW, addresses)
        rank, block = inner >> RANK_AT, pick(self.block, active)
        if (rank > self.size).any():
            raise KernelError(f"block {int(rank.max()) - 1} of a cluster of {self.size}")
        own = pick(self.rank, active)
        block = np.where(rank == 0, block, block - own + rank - 1)
        other = np.flatnonzero(block != pick(self.block, active))
        if not len(other):
            return memory.places(block, inner & ((1 << RANK_AT) - 1), width)
        if (pick(self.waited, active)[other] == 0).any():
            raise KernelError(
                "another block's shared memory, before a barrier of the cluster: that block may not have begun"
            )
        arrived = pick(self.arrived, active)[other]
        if (arrived >= self.ended[block[other]]).any():
            raise KernelError("the shared memory of a block that may have ended")
        np.maximum.at(self.touched, block[other], arrived)
        return memory.places(block, inner & ((1 << RANK_AT) - 1), width)

    def named_by(self, addresses: Indices, rank: Indices) -> Indices:
        """The same place in the shared memory of the block of that rank, as a generic address."""
        if (rank >= self.size).any() or (rank < 0).any():
            raise KernelError(f"rank {int(rank.max())} of a cluster of {self.size}")
        return SHARED_WINDOW + ((rank + 1) << RANK_AT) + (addresses & ((1 << RANK_AT) - 1))
