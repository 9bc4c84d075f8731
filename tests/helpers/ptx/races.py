"""Who touched memory last, so that an access which no barrier orders behind another warp's is found.

All threads run in lockstep here, so a barrier that is missing would not show in the values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class KernelError(Exception):
    """What a kernel must not do; the interpreter adds the kernel's name and the instruction."""


class Who:
    """The warps, blocks and barriers of the threads that make an access: arrays of one element per thread.

    `passed` counts a block's barriers. `arrived` and `waited` count a cluster's, whose two halves are apart.
    """

    def __init__(self, warp: Indices, block: Indices, passed: Indices, arrived: Indices, waited: Indices) -> None:
        self.warp, self.block, self.passed, self.arrived, self.waited = (
            a.reshape(-1, 1) for a in (warp, block, passed, arrived, waited)
        )

    def of(self, which: slice | NDArray[np.bool_]) -> Who:
        if isinstance(which, slice):
            return self
        return Who(*(a[which] for a in (self.warp, self.block, self.passed, self.arrived, self.waited)))


class Accesses:
    """The last access of each granule: the warp and block, and how many barriers that thread had passed before.

    An access of a warp is ordered before another warp's if the latter has passed a barrier at which the former arrived
    after its own. Blocks of different clusters never are.

    Args:
        granules: how many there are.
        cluster: blocks per cluster.
    """

    NOBODY, MANY = -1, -2

    def __init__(self, granules: int, cluster: int) -> None:
        self.cluster = cluster
        self.warp = np.full(granules, self.NOBODY, np.int64)  # MANY: several warps since the last barrier
        self.block = np.zeros(granules, np.int64)  # MANY: of several blocks; and so the cluster
        self.home = np.zeros(granules, np.int64)
        self.passed, self.arrived = np.zeros(granules, np.int64), np.zeros(granules, np.int64)

    def unordered(self, granules: Indices, who: Who) -> NDArray[np.bool_]:
        """Which accesses nothing orders behind the last one of another warp."""
        warp = self.warp[granules]
        other = (warp != self.NOBODY) & (warp != who.warp)
        if other.any():
            other &= (self.block[granules] != who.block) | (self.passed[granules] >= who.passed)
            apart = self.home[granules] != who.block // self.cluster
            other &= apart | (self.arrived[granules] >= who.waited)
        return other

    def check(self, granules: Indices, who: Who, what: str, verb: str, where: NDArray[np.bool_] | None = None) -> None:
        """A KernelError where an access, of those that `where` chooses, is not ordered behind the last one."""
        races = self.unordered(granules, who)
        if where is not None:
            races &= where[:, None]
        if races.any():
            thread, k = (int(i) for i in np.argwhere(races)[0])
            former = int(self.warp[granules[thread, k]])
            others = "several warps" if former == self.MANY else f"warp {former}"
            raise KernelError(
                f"a race: warp {int(who.warp[thread, 0])} touches {what} that {others} {verb}, with no barrier between"
            )

    def record(self, granules: Indices, who: Who) -> None:
        crowded = self.unordered(granules, who)
        own = ((self.warp, who.warp), (self.block, who.block), (self.home, who.block // self.cluster))
        for values, mine in own:
            values[granules] = np.where(crowded & (values[granules] != mine), self.MANY, mine)
        for counts, mine in ((self.passed, who.passed), (self.arrived, who.arrived)):
            counts[granules] = np.where(crowded, np.maximum(counts[granules], mine), mine)
        # Of threads that touch the same granule in one instruction the last one stands there now: the others see it.
        for values, mine in own:
            shared = ~crowded & (values[granules] != mine)
            if shared.any():
                values[granules[shared]] = self.MANY
