"""Instructions that read or write memory: ld, st, the asynchronous copies, and the matrices of a warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .clusters import LANES, Active
from .memory import RAW, SHARED_WINDOW, check_alignment
from .operands import dtype_of, reader, writer
from .parse import WIDTHS, Address, Instruction, Kernel, Literal, Operand
from .races import Indices, KernelError

if TYPE_CHECKING:
    from .execute import Threads

Run = Callable[[Any, Active], None]
Locate = Callable[[Any, Active], Indices]


def address_of(kernel: Kernel, operand: Operand) -> Locate:
    """[threads] int64."""
    assert isinstance(operand, Address)
    wide = kernel.registers.get(operand.base, "b64") not in ("b32", "u32", "s32")
    read = reader(kernel, operand.base, "u64" if wide else "u32")

    def addresses(s: Threads, active: Active) -> Indices:
        return np.broadcast_to(np.asarray(read(s, active)).astype(np.int64) + operand.offset, s.count(active))

    return addresses


def space_of(i: Instruction) -> str:
    """A generic address may be of global or of shared memory."""
    spaces = [part.partition("::")[0] for part in i.opcode]
    return next((space for space in spaces if space in ("global", "shared", "param", "local", "const")), "generic")


def pieces(operand: Operand) -> tuple[str | Literal, ...]:
    return operand if isinstance(operand, tuple) else (operand,)  # type: ignore[return-value]


def load(kernel: Kernel, i: Instruction) -> Run:
    kind, width, space = i.type, WIDTHS[i.type], space_of(i)
    targets, at = pieces(i.operands[0]), address_of(kernel, i.operands[1])
    writes, dtype = [writer(kernel, target, kind) for target in targets], dtype_of(i.type)
    read = {"param": load_parameter, "shared": load_shared, "global": load_global}.get(space, load_generic)

    def run(s: Threads, active: Active) -> None:
        values = read(s, at(s, active), active, width, len(writes)).view(dtype)
        for k, write in enumerate(writes):
            write(s, active, values[:, k])

    return run


def load_parameter(s: Threads, addresses: Indices, active: Active, width: int, count: int) -> NDArray:
    if addresses.min() < 0 or addresses.max() + width * count > len(s.parameters):
        raise KernelError("a parameter that the kernel was not given")
    if (addresses == addresses[0]).all():
        at = int(addresses[0])
        return s.parameters[at : at + width * count].copy().view(RAW[width])[None]
    return s.parameters[addresses[:, None] + np.arange(width * count)].view(RAW[width])


def load_shared(s: Threads, addresses: Indices, active: Active, width: int, count: int) -> NDArray:
    places = s.clusters.shared_places(s.shared, addresses, active, width * count)
    return s.shared.load(places, width, count, s.clusters.who(active))


def load_global(s: Threads, addresses: Indices, active: Active, width: int, count: int) -> NDArray:
    return s.memory.load(addresses, width, count, s.clusters.who(active))


def load_generic(s: Threads, addresses: Indices, active: Active, width: int, count: int) -> NDArray:
    return (load_shared if of_shared(addresses) else load_global)(s, addresses, active, width, count)


def of_shared(addresses: Indices) -> bool:
    """Of generic addresses: in the window of shared memory, all or none."""
    shared = (addresses >= SHARED_WINDOW) & (addresses < 2 * SHARED_WINDOW)
    if shared.any() and not shared.all():
        raise KernelError("generic addresses of shared and of global memory in one instruction")
    return bool(shared.any())


def store(kernel: Kernel, i: Instruction) -> Run:
    kind, width, space = f"b{8 * WIDTHS[i.type]}", WIDTHS[i.type], space_of(i)
    if space not in ("shared", "global", "generic"):
        raise KernelError("an instruction that is not implemented")
    reads = [reader(kernel, source, kind) for source in pieces(i.operands[1])]
    at = address_of(kernel, i.operands[0])

    def run(s: Threads, active: Active) -> None:
        addresses = at(s, active)
        values = np.empty((len(addresses), len(reads)), RAW[width])
        for k, read in enumerate(reads):
            values[:, k] = read(s, active)
        if space == "shared" or (space == "generic" and of_shared(addresses)):
            places = s.clusters.shared_places(s.shared, addresses, active, width * len(reads))
            s.shared.store(places, values, s.clusters.who(active))
        else:
            s.memory.store(addresses, values, s.clusters.who(active))

    return run


@dataclass
class Copy:
    """One asynchronous copy of each of some threads; done when they wait for its group, and not before."""

    threads: Indices
    group: Indices  # of each thread
    places: Indices  # in shared memory
    addresses: Indices
    kept: NDArray  # bytes that are copied; the rest of the width is 0
    width: int

    def of(self, which: NDArray[np.bool_]) -> Copy:
        rows = (self.threads, self.group, self.places, self.addresses, self.kept)
        return Copy(*(values[which] for values in rows), self.width)

    def perform(self, s: Threads) -> None:
        values = np.zeros((len(self.threads), self.width), np.uint8)
        for kept in np.unique(self.kept[self.kept > 0]):
            if kept % 4:
                raise KernelError("a copy of a part of a word is not implemented")
            these = self.kept == kept
            who = s.clusters.who(self.threads[these])
            for k in range(0, kept, 4):
                values[these, k : k + 4] = s.memory.load(self.addresses[these] + k, 4, 1, who).view(np.uint8)
        s.shared.store(self.places, values.view(np.uint32), s.clusters.who(self.threads))


def asynchronous(kernel: Kernel, i: Instruction) -> Run:
    """cp.async and its groups."""
    if "commit_group" in i.opcode:
        return lambda s, active: s.commit(active)
    if "wait_group" in i.opcode:
        (allowed,) = i.operands
        assert isinstance(allowed, Literal)
        return lambda s, active: s.complete(active, allowed.bits)
    if "wait_all" in i.opcode:
        return lambda s, active: (s.commit(active), s.complete(active, 0))[1]
    if i.opcode[1] != "async" or "mbarrier" in i.opcode or "bulk" in i.opcode:
        raise KernelError("an instruction that is not implemented")
    to, source, size = address_of(kernel, i.operands[0]), address_of(kernel, i.operands[1]), i.operands[2]
    assert isinstance(size, Literal)
    sized = len(i.operands) > 3 and (isinstance(i.operands[3], Literal) or kernel.registers[i.operands[3]] != "b64")
    kept_of = reader(kernel, i.operands[3] if sized else size, "u32")

    def run(s: Threads, active: Active) -> None:
        addresses, who = source(s, active), s.clusters.who(active)
        check_alignment(addresses, size.bits)
        kept = np.broadcast_to(np.asarray(kept_of(s, active)).astype(np.int64), len(addresses))
        if (kept > 0).any():
            s.memory.owners(addresses[kept > 0], 4)
        places = s.clusters.shared_places(s.shared, to(s, active), active, size.bits)
        s.shared.check_unread(places, size.bits, who)
        threads = s.everyone if active is None else active
        s.copies.append(Copy(threads, s.groups[threads].copy(), places, addresses.copy(), kept, size.bits))

    return run


def matrices(kernel: Kernel, i: Instruction) -> Run:
    """ldmatrix and stmatrix: 8×8 matrices of 16-bit elements, whose rows eight lanes each give the addresses of."""
    if "m8n8" not in i.opcode or i.type != "b16":
        raise KernelError("an instruction that is not implemented")
    loads, transposed = i.name == "ldmatrix", "trans" in i.opcode
    registers, address = (i.operands[0], i.operands[1]) if loads else (i.operands[1], i.operands[0])
    at, names = address_of(kernel, address), pieces(registers)
    reads = [reader(kernel, name, "b32") for name in names]
    writes = [writer(kernel, name, "b32") for name in names] if loads else []

    def run(s: Threads, active: Active) -> None:
        s.clusters.require_whole_warps(active)
        addresses = at(s, active).reshape(-1, LANES)
        threads = (s.everyone if active is None else active).reshape(-1, LANES)
        for k in range(len(names)):
            givers = threads[:, 8 * k : 8 * k + 8].ravel()
            places = s.clusters.shared_places(s.shared, addresses[:, 8 * k : 8 * k + 8].ravel(), givers, 16)
            who = s.clusters.who(givers)
            if loads:
                rows = s.shared.load(places, 2, 8, who).reshape(-1, 8, 8)
                rows = rows.transpose(0, 2, 1) if transposed else rows
                writes[k](s, active, np.ascontiguousarray(rows).view(np.uint32).ravel())
            else:
                rows = np.ascontiguousarray(reads[k](s, active)).view(np.uint16).reshape(-1, 8, 8)
                rows = rows.transpose(0, 2, 1) if transposed else rows
                s.shared.store(places, np.ascontiguousarray(rows).reshape(-1, 8), who)

    return run


def access(kernel: Kernel, i: Instruction) -> Run | None:
    """None where the instruction is of another kind."""
    kinds: dict[str, Callable[[Kernel, Instruction], Run]] = {
        "ld": load, "st": store, "cp": asynchronous, "ldmatrix": matrices, "stmatrix": matrices,
    }  # fmt: skip
    return kinds[i.name](kernel, i) if i.name in kinds else None
