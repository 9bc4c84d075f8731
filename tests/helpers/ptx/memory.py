"""The memory of a device: allocations that every access must lie in, on its own boundary, and shared memory.

Global addresses are those of the CPU tensors that a launch was given; nothing else can be read or written. Shared
memory starts as NaN in every type, and an access is a race where no barrier lies between it and another warp's write,
or its write and another warp's access: threads run in lockstep here, so a missing barrier would not show in the values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

#: Where the window of shared memory begins among generic addresses. In it, and in 32-bit shared addresses, the bits
#: from RANK_AT on name a block of the cluster by its rank + 1; 0 is the thread's own block.
SHARED_WINDOW = 1 << 44
RANK_AT = 24
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Indices = NDArray[np.int64]


class KernelError(Exception):
    """What a kernel must not do; the interpreter adds the kernel's name and the instruction."""


def check_alignment(addresses: Indices, width: int) -> None:
    off = (addresses & (width - 1)) != 0
    if off.any():
        raise KernelError(f"address {int(addresses[off][0]):#x} is not on a boundary of {width} bytes")


class GlobalMemory:
    """Allocations as [start, end) of real addresses, under the names of the arguments that they came from."""

    def __init__(self, allocations: Iterable[tuple[str, int, int]]) -> None:
        merged: dict[tuple[int, int], list[str]] = {}
        for name, start, size in allocations:
            if size:
                merged.setdefault((start, start + size), []).append(name)
        spans = sorted(merged)
        self.names = [", ".join(merged[span]) for span in spans]
        self.starts = np.array([start for start, _ in spans], np.int64)
        self.ends = np.array([end for _, end in spans], np.int64)
        self.first = self.starts & ~31
        # Whole 32-byte units around each allocation, so that any element has an index; bounds are checked before.
        self.bytes = [
            np.frombuffer(
                (ctypes.c_uint8 * (-(-end // 32) * 32 - start // 32 * 32)).from_address(start // 32 * 32), "u1"
            )
            for start, end in spans
        ]

    def owners(self, addresses: Indices, width: int) -> Indices:
        """The allocation of each access, all of whose bytes must lie in it."""
        check_alignment(addresses, width)
        owner = np.searchsorted(self.starts, addresses, "right") - 1
        outside = owner < 0
        outside |= addresses + width > self.ends[owner] if len(self.ends) else True
        if outside.any():
            raise KernelError(self.describe(int(addresses[outside][0]), width))
        return owner

    def describe(self, address: int, width: int) -> str:
        if not len(self.starts):
            return f"{width} bytes at {address:#x}, but the kernel was given no memory"
        distance = np.maximum(self.starts - address, address + width - self.ends)
        near = int(distance.argmin())
        return (
            f"{width} bytes at {address:#x} lie outside of every tensor; the nearest is {self.names[near]}, of "
            f"{self.ends[near] - self.starts[near]} bytes, at byte {address - int(self.starts[near])} of it"
        )

    def load(self, addresses: Indices, width: int, count: int) -> NDArray[np.unsignedinteger]:
        """[accesses, count] elements of `width` bytes, which lie behind one another."""
        owner = self.owners(addresses, width * count)
        out = np.empty((len(addresses), count), RAW[width])
        for k, these in parts(owner):
            out[these] = self.elements(k, width, count)[(addresses[these] - self.first[k]) // (width * count)]
        return out

    def store(self, addresses: Indices, values: NDArray[np.unsignedinteger]) -> None:
        width, count = values.dtype.itemsize, values.shape[1]
        owner = self.owners(addresses, width * count)
        for k, these in parts(owner):
            self.elements(k, width, count)[(addresses[these] - self.first[k]) // (width * count)] = values[these]

    def elements(self, allocation: int, width: int, count: int) -> NDArray[np.unsignedinteger]:
        return self.bytes[allocation].view(RAW[width]).reshape(-1, count)


def parts(owner: Indices) -> Iterable[tuple[int, slice | NDArray[np.bool_]]]:
    first = int(owner[0])
    if (owner == first).all():
        return [(first, slice(None))]
    return [(int(k), owner == k) for k in np.unique(owner)]


class SharedMemory:
    """[blocks, bytes], and who touched each `granule` of it last."""

    def __init__(self, blocks: int, size: int, granule: int) -> None:
        self.size, self.stride = size, -(-max(size, 1) // 16) * 16
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)  # NaN as float32, bfloat16 and float16
        self.granule = granule
        self.writes, self.reads = (Accesses(blocks * self.stride // granule) for _ in range(2))

    def places(self, blocks: Indices, offsets: Indices, width: int) -> Indices:
        """Bytes from the beginning of all shared memory; checks bounds and alignment."""
        check_alignment(offsets, width)
        outside = (offsets < 0) | (offsets + width > self.size)
        if outside.any():
            raise KernelError(
                f"{width} bytes at {int(offsets[outside][0])} lie outside of the {self.size} bytes of shared memory"
            )
        return blocks * self.stride + offsets

    def load(self, places: Indices, width: int, count: int, who: Who) -> NDArray[np.unsignedinteger]:
        granules = self.granules(places, width * count)
        self.writes.check(granules, who, "written")
        self.reads.record(granules, who)
        return self.elements(width, count)[places // (width * count)]

    def store(self, places: Indices, values: NDArray[np.unsignedinteger], who: Who) -> None:
        """Warps may write the same value to the same place, as they do with what a layout replicates.

        Of the lanes of one warp the last one writes: the hardware chooses one of them, and Triton's sums over lanes
        may differ in their last bit where a product is contracted into an addition.
        """
        width, count = values.dtype.itemsize, values.shape[1]
        elements, at = self.elements(width, count), places // (width * count)
        granules = self.granules(places, width * count)
        self.writes.check(granules, who, "written", (elements[at] != values).any(1))
        self.reads.check(granules, who, "read")
        self.writes.record(granules, who)
        elements[at] = values
        warp = who.warp[:, 0]
        if (elements[at] != values).any():
            _, latest = np.unique((places * (int(warp.max()) + 1) + warp)[::-1], return_index=True)
            latest = len(places) - 1 - latest
            if not (elements[at[latest]] != values[latest]).any():
                return
            raise KernelError("a race: threads write different values to the same place of shared memory")

    def elements(self, width: int, count: int) -> NDArray[np.unsignedinteger]:
        return self.bytes.view(RAW[width]).reshape(-1, count)

    def granules(self, places: Indices, width: int) -> Indices:
        first = places // self.granule
        if width <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(width // self.granule)


class Who:
    """The warps, blocks and barriers of the threads that make an access: arrays of one element per thread.

    `passed` counts a block's barriers. `arrived` and `waited` count a cluster's, whose two halves are apart.
    """

    def __init__(self, warp: Indices, block: Indices, passed: Indices, arrived: Indices, waited: Indices) -> None:
        self.warp, self.block, self.passed, self.arrived, self.waited = (
            a[:, None] for a in (warp, block, passed, arrived, waited)
        )


class Accesses:
    """The last access of each granule: the warp and block, and how many barriers that thread had passed before.

    An access of a warp is ordered before another warp's if the latter has passed a barrier at which the former arrived
    after its own.
    """

    NOBODY, MANY = -1, -2

    def __init__(self, granules: int) -> None:
        self.warp = np.full(granules, self.NOBODY, np.int64)  # MANY: several warps since the last barrier
        self.block = np.zeros(granules, np.int64)  # MANY: of several blocks
        self.passed, self.arrived = np.zeros(granules, np.int64), np.zeros(granules, np.int64)

    def unordered(self, granules: Indices, who: Who) -> NDArray[np.bool_]:
        """Which accesses nothing orders behind the last one of another warp."""
        warp = self.warp[granules]
        other = (warp != self.NOBODY) & (warp != who.warp)
        if other.any():
            other &= (self.block[granules] != who.block) | (self.passed[granules] >= who.passed)
            other &= self.arrived[granules] >= who.waited
        return other

    def check(self, granules: Indices, who: Who, verb: str, where: NDArray[np.bool_] | None = None) -> None:
        races = self.unordered(granules, who)
        if where is not None:
            races &= where[:, None]
        if races.any():
            thread, k = (int(i) for i in np.argwhere(races)[0])
            former = int(self.warp[granules[thread, k]])
            others = "several warps" if former == self.MANY else f"warp {former}"
            raise KernelError(
                f"a race: warp {int(who.warp[thread, 0])} touches shared memory that {others} {verb} and no barrier "
                "lies between"
            )

    def record(self, granules: Indices, who: Who) -> None:
        shape = granules.shape
        crowded = self.unordered(granules, who)
        several_blocks = crowded & (self.block[granules] != who.block)
        self.passed[granules], self.arrived[granules] = who.passed, who.arrived
        self.block[granules] = np.where(several_blocks, self.MANY, np.broadcast_to(who.block, shape))
        warp = np.broadcast_to(who.warp, shape)
        self.warp[granules] = np.where(crowded, self.MANY, warp)
        # Threads of one instruction that touch the same granule: the last one stands there, so the others see it.
        shared = (self.warp[granules] != warp) & ~crowded
        if shared.any():
            apart = shared & (self.block[granules] != who.block)
            self.warp[granules[shared]] = self.MANY
            self.block[granules[apart]] = self.MANY
