"""Instructions that threads run together, or that decide where they go on: barriers, shuffles, branches, exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .accesses import matrices
from .clusters import LANES, Active, Clusters
from .operands import reader, writer
from .parse import Instruction, Kernel, Literal
from .races import Indices, KernelError

if TYPE_CHECKING:
    from .execute import Threads


class Gate(NamedTuple):
    """Where threads wait for one another."""

    come: Callable[[Clusters, Indices], None]  # when a thread comes to it
    may_pass: Callable[[Clusters, Indices], NDArray[np.bool_]]  # which of those that wait here
    run: Callable[[Threads, Active], None]  # of those that pass together
    awaited: str


def count_block(clusters: Clusters, threads: Indices) -> None:
    clusters.passed[threads] += 1


def count_cluster(clusters: Clusters, threads: Indices) -> None:
    clusters.waited[threads] += 1
    if (clusters.waited[threads] > clusters.arrived[threads]).any():
        raise KernelError("a thread waits at the cluster's barrier without having arrived at it")


def nothing(*_: object) -> None:
    pass


def is_gate(i: Instruction) -> bool:
    if i.opcode[:2] == ("barrier", "cluster"):
        return "wait" in i.opcode
    return i.name in ("bar", "barrier", "shfl", "ldmatrix", "stmatrix")


def gate(kernel: Kernel, i: Instruction) -> Gate:
    if i.name == "shfl":
        return Gate(nothing, Clusters.in_whole_warps, shuffle(kernel, i), "warp")
    if i.name in ("ldmatrix", "stmatrix"):
        return Gate(nothing, Clusters.in_whole_warps, matrices(kernel, i), "warp")
    if i.opcode[1] == "warp":
        return Gate(nothing, Clusters.in_whole_warps, nothing, "warp")
    if i.opcode[1] == "cluster":
        return Gate(count_cluster, Clusters.past_cluster_barrier, nothing, "cluster")
    if i.opcode[1] not in ("sync", "cta") or i.operands != (Literal(0),):
        raise KernelError("an instruction that is not implemented")
    return Gate(count_block, Clusters.past_block_barrier, nothing, "block")


def shuffle(kernel: Kernel, i: Instruction) -> Callable[[Threads, Active], None]:
    mode, target = i.opcode[2], i.operands[0]
    has_predicate = len(i.operands) == 6
    source, by, bounds, members = (
        reader(kernel, operand, "b32") for operand in i.operands[2 if has_predicate else 1 :]
    )
    write = writer(kernel, target, "b32")
    write_inside = writer(kernel, i.operands[1], "pred") if has_predicate else None

    def run(s: Threads, active: Active) -> None:
        if (np.asarray(members(s, active)) != 0xFFFFFFFF).any():
            raise KernelError("a shuffle of a part of a warp is not implemented")
        s.clusters.require_whole_warps(active)
        values, lane = source(s, active), s.clusters.lane if active is None else s.clusters.lane[active]
        b, c = (np.asarray(read(s, active)).astype(np.int64) for read in (by, bounds))
        b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
        last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
        if mode == "up":
            other, inside = lane - b, lane - b >= last
        elif mode == "idx":
            other = first | (b & ~segment & 31)
            inside = other <= last
        else:
            other = lane ^ b if mode == "bfly" else lane + b
            inside = other <= last
        other = np.where(inside, other, lane)
        write(s, active, np.broadcast_to(values, len(lane))[np.arange(len(lane)) - lane + other])
        if write_inside is not None:
            write_inside(s, active, inside)

    return run


def arrive_at_cluster(s: Threads, active: Active) -> None:
    s.clusters.arrived[slice(None) if active is None else active] += 1


def predicate_of(kernel: Kernel, i: Instruction) -> Callable[[Threads, Active], NDArray[np.bool_]] | None:
    if i.predicate is None:
        return None
    read = reader(kernel, i.predicate, "pred")
    return (lambda s, active: ~read(s, active)) if i.negated else read


assert LANES == 32, "the fields of shfl's operands are of five bits"
