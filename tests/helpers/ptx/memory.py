"""The memory of a device: allocations that every access must lie in, on its own boundary, and shared memory.

Global addresses are those of the CPU tensors that a launch was given; nothing else can be read or written. Shared
memory starts as NaN in every type. In both, an access is a race where no barrier lies between it and another warp's
write, or between its write and another warp's access.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .races import Accesses, Indices, KernelError, Who

#: Where the window of shared memory begins among generic addresses. In it, and in 32-bit shared addresses, the bits
#: from RANK_AT on name a block of the cluster by its rank + 1; 0 is the thread's own block.
SHARED_WINDOW = 1 << 44
RANK_AT = 24
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def check_alignment(addresses: Indices, width: int) -> None:
    off = (addresses & (width - 1)) != 0
    if off.any():
        raise KernelError(f"address {int(addresses[off][0]):#x} is not on a boundary of {width} bytes")


class Region:
    """Bytes, and who touched each `granule` of them last; a granule of 0 looks for no races."""

    def __init__(self, what: str, memory: NDArray[np.uint8], granule: int, cluster: int) -> None:
        self.what, self.bytes, self.granule = what, memory, granule
        self.writes, self.reads = (Accesses(len(memory) // granule if granule else 0, cluster) for _ in range(2))

    def load(self, places: Indices, width: int, count: int, who: Who) -> NDArray[np.unsignedinteger]:
        """[places, count] elements of `width` bytes, which lie behind one another."""
        if self.granule:
            granules = self.granules(places, width * count)
            self.writes.check(granules, who, self.what, "wrote")
            self.reads.record(granules, who)
        return self.elements(width, count)[places // (width * count)]

    def store(self, places: Indices, values: NDArray[np.unsignedinteger], who: Who) -> None:
        """Warps may write the same value to the same place, as they do with what a layout replicates.

        Of the lanes of one warp the last one writes: the hardware chooses one of them, and Triton's sums over lanes
        may differ in their last bit where a product is contracted into an addition.
        """
        width, count = values.dtype.itemsize, values.shape[1]
        elements, at = self.elements(width, count), places // (width * count)
        if self.granule:
            granules = self.granules(places, width * count)
            self.writes.check(granules, who, self.what, "wrote", (elements[at] != values).any(1))
            self.reads.check(granules, who, self.what, "read")
            self.writes.record(granules, who)
        elements[at] = values
        if self.granule and (elements[at] != values).any():
            warp = who.warp[:, 0] - who.warp.min()
            _, latest = np.unique((places * (int(warp.max()) + 1) + warp)[::-1], return_index=True)
            latest = len(places) - 1 - latest
            if (elements[at[latest]] != values[latest]).any():
                raise KernelError(f"a race: threads write different values to the same place of {self.what}")

    def check_unread(self, places: Indices, width: int, who: Who) -> None:
        self.reads.check(self.granules(places, width), who, self.what, "read")

    def elements(self, width: int, count: int) -> NDArray[np.unsignedinteger]:
        return self.bytes.view(RAW[width]).reshape(-1, count)

    def granules(self, places: Indices, width: int) -> Indices:
        first = places // self.granule
        return first[:, None] + np.arange(max(1, width // self.granule))


class GlobalMemory:
    """Allocations as [start, end) of real addresses, under the names of the arguments that they came from.

    Args:
        allocations: (name, address, bytes) of each.
        granule: bytes of the kernel's narrowest access; 0: races are not looked for.
        cluster: blocks per cluster.
    """

    def __init__(self, allocations: Iterable[tuple[str, int, int]], granule: int, cluster: int) -> None:
        merged: dict[tuple[int, int], list[str]] = {}
        for name, start, size in allocations:
            if size:
                merged.setdefault((start, start + size), []).append(name)
        spans = sorted(merged)
        self.names = [", ".join(merged[span]) for span in spans]
        self.starts = np.array([start for start, _ in spans], np.int64)
        self.ends = np.array([end for _, end in spans], np.int64)
        self.first = self.starts & ~31
        self.granule, self.cluster = granule, cluster
        self.regions: dict[int, Region] = {}

    def region(self, k: int) -> Region:
        """Whole 32-byte units around an allocation, so that any element has an index; bounds are checked before."""
        if k not in self.regions:
            first, end = int(self.first[k]), -(-int(self.ends[k]) // 32) * 32
            memory = np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8)
            self.regions[k] = Region(self.names[k], memory, self.granule, self.cluster)
        return self.regions[k]

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

    def load(self, addresses: Indices, width: int, count: int, who: Who) -> NDArray[np.unsignedinteger]:
        owner = self.owners(addresses, width * count)
        out = np.empty((len(addresses), count), RAW[width])
        for k, these in parts(owner):
            out[these] = self.region(k).load(addresses[these] - self.first[k], width, count, who.of(these))
        return out

    def store(self, addresses: Indices, values: NDArray[np.unsignedinteger], who: Who) -> None:
        owner = self.owners(addresses, values.dtype.itemsize * values.shape[1])
        for k, these in parts(owner):
            self.region(k).store(addresses[these] - self.first[k], values[these], who.of(these))


def parts(owner: Indices) -> Iterable[tuple[int, slice | NDArray[np.bool_]]]:
    first = int(owner[0])
    if (owner == first).all():
        return [(first, slice(None))]
    return [(int(k), owner == k) for k in np.unique(owner)]


class SharedMemory(Region):
    """That of several blocks, one behind another."""

    def __init__(self, blocks: int, size: int, granule: int, cluster: int) -> None:
        self.size, self.stride = size, -(-max(size, 1) // 16) * 16
        fresh = np.full(blocks * self.stride, 0xFF, np.uint8)  # NaN as float32, bfloat16 and float16
        super().__init__("shared memory", fresh, granule, cluster)

    def places(self, blocks: Indices, offsets: Indices, width: int) -> Indices:
        """Bytes from the beginning of all shared memory; checks bounds and alignment."""
        check_alignment(offsets, width)
        outside = (offsets < 0) | (offsets + width > self.size)
        if outside.any():
            raise KernelError(
                f"{width} bytes at {int(offsets[outside][0])} lie outside of the {self.size} bytes of shared memory"
            )
        return blocks * self.stride + offsets
