"""Thread blocks and clusters of PTX, run on a CPU: NumPy over all threads of many blocks at once.

Threads that diverge run the part that comes first in the text until they meet again. An instruction that threads run
together (a barrier, a shuffle, a matrix) holds them until all that it needs have come; where nothing can go on, or the
kernel goes on for too long, that is an error with the kernel's name and the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .accesses import Copy, access, space_of
from .arithmetic import arithmetic
from .clusters import Active, Clusters, pick
from .control import Gate, arrive_at_cluster, gate, is_gate, predicate_of
from .memory import GlobalMemory, SharedMemory
from .operands import dtype_of
from .parse import WIDTHS, Instruction, Kernel
from .races import Indices, KernelError

Run = Callable[[Any, Active], None]

#: Threads that are run together at most: as many as hide what a NumPy call costs, and no more than the cache holds.
TOGETHER = 8192
MOST_STEPS = 1_000_000
#: Instructions that order memory or help a cache: an instruction is run by all threads before the next one.
NOTHING = ("membar", "fence", "griddepcontrol", "prefetch", "prefetchu", "nanosleep")
END = Instruction(("exit",), (), None, False, 0, "the end of the kernel")


class PtxError(Exception):
    """A kernel did what it must not do."""


class Launch(NamedTuple):
    grid: tuple[int, int]
    threads: int
    cluster: int = 1
    dynamic_shared: int = 0
    global_races: bool = True  # whether they are errors; races in shared memory always are


class Program:
    """A kernel, ready to be launched any number of times."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.instructions = [*kernel.instructions, END]
        self.predicates = [predicate_of(kernel, i) for i in self.instructions]
        #: None: a branch, an exit or a gate. The others are compiled when they are first run; many never are.
        self.plain: list[Run | None] = [
            None if i.name in ("bra", "ret", "exit") or is_gate(i) else self.compiled_on_the_way(pc)
            for pc, i in enumerate(self.instructions)
        ]
        self.gates: dict[int, Gate] = {}
        touches = [i for i in kernel.instructions if i.name in ("ld", "st") and space_of(i) != "param"]
        matrices = [2 for i in kernel.instructions if i.name in ("ldmatrix", "stmatrix")]
        self.granule = min([4, *matrices, *(WIDTHS[i.type] for i in touches)])
        self.constants = {name: np.frombuffer(value, np.uint8) for name, value in kernel.constants.items()}

    def compiled_on_the_way(self, pc: int) -> Run:
        def first(s: Threads, active: Active) -> None:
            run, predicate = plain(self.kernel, self.instructions[pc]), self.predicates[pc]
            self.plain[pc] = run = run if predicate is None else guarded(run, predicate)
            run(s, active)

        return first

    def gate(self, pc: int) -> Gate:
        if pc not in self.gates:
            self.gates[pc] = gate(self.kernel, self.instructions[pc])
        return self.gates[pc]

    def __call__(self, parameters: bytes, allocations: Iterable[tuple[str, int, int]], launch: Launch) -> None:
        """Runs the whole grid.

        Args:
            parameters: the kernel's parameters as they lie in memory.
            allocations: (name, address, bytes) of all that the kernel may read or write.
        """
        tables = [(name, table.ctypes.data, len(table)) for name, table in self.constants.items()]
        granule = self.granule if launch.global_races else 0
        memory = GlobalMemory([*allocations, *tables], granule, launch.cluster)
        given = np.zeros(self.kernel.parameter_bytes, np.uint8)
        given[: len(parameters)] = np.frombuffer(parameters, np.uint8)[: len(given)]
        clusters = launch.grid[0] * launch.grid[1] // launch.cluster
        each = max(1, TOGETHER // (launch.threads * launch.cluster))
        for first in range(0, clusters, each):
            part = Clusters(first, min(each, clusters - first), launch.grid, launch.threads, launch.cluster)
            with np.errstate(all="ignore"):
                Threads(self, part, memory, given, launch.dynamic_shared).run()


def plain(kernel: Kernel, i: Instruction) -> Run:
    """What one thread does without another."""
    if i.opcode[:2] == ("barrier", "cluster"):
        return arrive_at_cluster
    if i.name in NOTHING:
        return lambda s, active: None
    run = access(kernel, i) or arithmetic(kernel, i)
    if run is None:
        raise KernelError("an instruction that is not implemented")
    return run


def guarded(run: Run, predicate: Callable[[Any, Active], NDArray]) -> Run:
    def where_true(s: Threads, active: Active) -> None:
        chosen = predicate(s, active)
        if chosen.all():
            run(s, active)
        elif chosen.any():
            run(s, np.flatnonzero(chosen) if active is None else active[chosen])

    return where_true


class Threads:
    """The threads that run together: their registers, copies under way, and where each of them is."""

    def __init__(
        self, program: Program, clusters: Clusters, memory: GlobalMemory, parameters: NDArray, dynamic_shared: int
    ) -> None:
        self.program, self.clusters, self.memory, self.parameters = program, clusters, memory, parameters
        self.constants = program.constants
        shared = program.kernel.static_shared_bytes + dynamic_shared
        self.shared = SharedMemory(clusters.blocks, shared, program.granule, clusters.size)
        self.registers: dict[str, NDArray] = {}
        self.views: dict[tuple[str, np.dtype], NDArray] = {}
        self.copies: list[Copy] = []
        self.groups = np.zeros(clusters.total, np.int64)  # of copies, committed
        self.everyone = np.arange(clusters.total)
        self.ready: dict[int, list[Indices]] = {0: [self.everyone]}  # by the instruction that they run next
        self.parked: dict[int, Indices] = {}  # by the gate that they wait at

    def view(self, key: tuple[str, np.dtype]) -> NDArray:
        """A register of all threads as that type; before it is written it holds NaN in every type."""
        if key not in self.views:
            name, dtype = key
            if name not in self.registers:
                held = dtype_of(self.program.kernel.registers[name])
                fresh = np.full(self.clusters.total * held.itemsize, 0 if held == np.bool_ else 0xFF, np.uint8)
                self.registers[name] = fresh.view(held)
            self.views[key] = self.registers[name].view(dtype)
        return self.views[key]

    def count(self, active: Active) -> int:
        return self.clusters.total if active is None else len(active)

    def ranks(self, active: Active) -> Indices:
        return pick(self.clusters.rank, active)

    def indices(self, active: Active) -> Indices:
        return self.everyone if active is None else active

    def commit(self, active: Active) -> None:
        self.groups[self.indices(active)] += 1

    def complete(self, active: Active, allowed: int) -> None:
        """Does the copies of all groups of these threads but the last `allowed`."""
        waits = np.zeros(self.clusters.total, np.bool_)
        waits[self.indices(active)] = True
        left = []
        for copy in self.copies:
            due = waits[copy.threads] & (copy.group < self.groups[copy.threads] - allowed)
            if due.any():
                copy.of(due).perform(self)
            if not due.all():
                left.append(copy.of(~due))
        self.copies = left

    def run(self) -> None:
        steps, runs, pc = 0, self.program.plain, 0
        try:
            while self.ready or self.release():
                pc = start = min(self.ready)
                active = self.together(self.ready.pop(pc))
                limit = min(self.ready, default=len(runs))
                while pc < limit and (run := runs[pc]) is not None:
                    run(self, active)
                    pc += 1
                if pc < limit:
                    self.control(pc, active)
                else:
                    self.go(pc, self.indices(active))
                steps += pc - start + 1
                if steps > MOST_STEPS:
                    raise KernelError(f"the kernel has not ended after {steps} instructions")
        except KernelError as fault:
            raise self.error(pc, str(fault)) from fault

    def together(self, groups: list[Indices]) -> Active:
        active = groups[0] if len(groups) == 1 else np.sort(np.concatenate(groups))
        return None if len(active) == self.clusters.total else active

    def go(self, pc: int, threads: Indices) -> None:
        if len(threads):
            self.ready.setdefault(pc, []).append(threads)

    def control(self, pc: int, active: Active) -> None:
        """A branch, an exit or a gate: says where each of the threads goes on."""
        i, predicate, threads = self.program.instructions[pc], self.program.predicates[pc], self.indices(active)
        if predicate is not None:
            chosen = predicate(self, active)
            self.go(pc + 1, threads[~chosen])
            threads = threads[chosen]
            if not len(threads):
                return
        if is_gate(i):
            gate = self.program.gate(pc)
            gate.come(self.clusters, threads)
            waiting = [self.parked.pop(pc), threads] if pc in self.parked else [threads]
            self.pass_gate(pc, gate, self.indices(self.together(waiting)))
        elif i.name == "bra":
            self.go(self.program.kernel.labels[str(i.operands[0])], threads)
        else:
            self.clusters.exit(threads)

    def pass_gate(self, pc: int, gate: Gate, waiting: Indices) -> bool:
        """Lets those go on that may; the others wait."""
        may_pass = gate.may_pass(self.clusters, waiting)
        if not may_pass.all():
            self.parked[pc] = waiting[~may_pass]
        passing = waiting[may_pass]
        if len(passing):
            gate.run(self, self.together([passing]))
            self.go(pc + 1, passing)
        return len(passing) > 0

    def release(self) -> bool:
        """Whether threads at a gate may go on by now; an error where none does, for then none ever will."""
        for pc, waiting in sorted(self.parked.items()):
            del self.parked[pc]
            try:
                if self.pass_gate(pc, self.program.gate(pc), waiting):
                    return True
            except KernelError as fault:
                raise self.error(pc, str(fault)) from fault
        if self.parked:
            raise self.deadlock()
        return False

    def deadlock(self) -> PtxError:
        pc, waiting = min(self.parked.items())
        where = [f"{len(threads)} at line {self.program.instructions[at].line}" for at, threads in self.parked.items()]
        message = (
            f"threads wait for others of their {self.program.gate(pc).awaited} that never come: {', '.join(where)}, "
            f"{self.clusters.done.sum()} have ended; the first that waits here is thread {waiting[0]}"
        )
        return self.error(pc, message)

    def error(self, pc: int, message: str) -> PtxError:
        i = self.program.instructions[pc]
        return PtxError(f"{self.program.kernel.title}, PTX line {i.line}: {i.text}: {message}")
