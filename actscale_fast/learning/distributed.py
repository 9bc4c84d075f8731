"""The processes that work on one fit or sweep together, as torchrun and accelerate start them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._log import notice
from ..architectures.hugging_face import unwrap
from ..architectures.sharding import ALONE, ModelProcesses, model_processes
from .broken_connections import explained

T = TypeVar("T")

#: Numbers the groups of this process, so that no two share the keys by which their members find each other.
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes of one call, and the place of this one among them.

    Each of several copies of the model has a share of the work. A copy may itself be held by several processes, which
    move together: with tensor parallelism they are one place among those that share the work (the mesh's model group),
    with FSDP2 each has a place of its own.
    """

    rank: int = 0  # the place among those that share the work
    size: int = 1
    #: The processes that hold the model with this one.
    model: ModelProcesses = ALONE
    n_processes: int = 1  # in all
    #: torch.distributed's groups over which a sum is that of all that share the work; None: the default group.
    peers: tuple[Any, ...] = (None,)
    everybody: Any = None  # the group of all processes

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0 and self.model.leads

    @property
    def splits_rows_alone(self) -> bool:
        """Whether they can share the rows of a step, but not the fits of a sweep, because they move together."""
        return self.model.size > 1 and not self.model.same_rows

    def shard(self, work: Sequence[T]) -> list[T]:
        """The part of the work that this process does: every size-th piece."""
        return list(work[self.rank :: self.size])

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their sums over all that share the work, in one message; all get the same bits."""
        if self.n_processes == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        if self.size > 1:
            for group in self.peers:
                torch.distributed.all_reduce(flat, group=group)
        if self.size < self.n_processes:  # else the sum has given all of them the same bits
            self.model.broadcast_([flat])
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def all_gather(self, value: Any) -> list[Any]:
        """The objects of all processes in every process; the first is that of rank zero."""
        if self.n_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.n_processes
        torch.distributed.all_gather_object(gathered, (self.rank, self.model.rank, value), group=self.everybody)
        return [value for *_, value in sorted(gathered, key=lambda one: one[:2])]

    def of_one_fit(self) -> ProcessGroup:
        """The processes that share a fit of a sweep, whose fits are divided among all."""
        if self.splits_rows_alone:
            return self
        return ProcessGroup(model=self.model, n_processes=self.model.size, everybody=self.model.group)

    def refuse_different(self, value: Any, what: str) -> None:
        """Raise a ValueError in every process if they do not all have the same value."""
        if any(other != value for other in self.all_gather(value)):
            raise ValueError(
                f"distributed: the processes have different {what}; pass distributed=False if each works alone"
            )


SINGLE_PROCESS = ProcessGroup()


@contextlib.contextmanager
def process_group(distributed: bool | None, model: nn.Module | None = None) -> Iterator[ProcessGroup]:
    """The processes that share a call; a group that is created here is destroyed at the end.

    Args:
        distributed: None: use the existing process group, or create the one that the environment of torchrun or
            accelerate describes (gloo for CPUs, nccl for GPUs); without either, work alone, and so in a worker of Ray,
            whose ranks serve other purposes. True: use the group or the environment, but raise if there is only one
            process. False: work alone; the processes that hold a sharded model do all of it together.
        model: the model that works, which may be sharded over some of the processes; None: it is not sharded.

    Raises:
        RuntimeError: `distributed` is True, and there is neither a group nor such an environment; or another process
            stopped, whose reason the message names.
        ValueError: the model is sharded in a way that is not supported.
    """
    from torch import distributed as processes

    held = ALONE if model is None else model_processes(unwrap(model))
    available = distributed is not False and processes.is_available()
    if available and distributed is None and _is_worker_of_ray():
        if processes.is_initialized() or "RANK" in os.environ:
            notice("this worker of Ray works alone; distributed=True shares the work with the others")
        available = False
    if available and processes.is_initialized():
        with _sharing(held) as found, explained(range(processes.get_world_size())):
            yield found
    elif available and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        rank, size = join_environment()
        try:
            with explained(range(size)):
                yield ProcessGroup(rank, size, n_processes=size)
        finally:
            processes.destroy_process_group()
    elif distributed:
        raise RuntimeError("distributed: there is one process only; start several with torchrun or accelerate")
    else:
        with explained(held.ranks):
            yield ProcessGroup(model=held, n_processes=held.size, everybody=held.group)


def join_environment() -> tuple[int, int]:
    """Create the default process group as the environment of torchrun or accelerate says.

    Returns:
        (rank, number of processes).
    """
    from torch import distributed as processes

    # Both backends where there are GPUs: the model may still be on the CPU, and objects are sent through gloo.
    on_gpus = torch.cuda.is_available() and processes.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    store, rank, size = _rendezvous()
    store = processes.PrefixStore(f"actscale_fast/{next(_numbers)}", store)
    processes.init_process_group(backend, store=store, rank=rank, world_size=size)
    return rank, size


@contextlib.contextmanager
def _sharing(held: ModelProcesses) -> Iterator[ProcessGroup]:
    """All processes of the default group, where this one holds the model with some of them."""
    from torch import distributed as processes

    rank, size = processes.get_rank(), processes.get_world_size()
    if held.size == 1:
        yield ProcessGroup(rank, size, n_processes=size)
        return
    if held.size == size:
        yield ProcessGroup(held.place, held.n_places, held, size, held.peers)
        return
    gathered: list[Any] = [None] * size
    processes.all_gather_object(gathered, held.ranks)
    copies = sorted(set(gathered))
    whole = {len(ranks) for ranks in copies} == {held.size} and sum(map(len, copies)) == size
    if not whole or not held.same_rows:
        raise ValueError(
            f"model: it is held by the processes {held.ranks} of {size}, expected copies of it that have equally many "
            "processes each by tensor parallelism, or all processes with FSDP2"
        )
    # The n-th processes of all copies work side by side. All must create all groups, in the same order.
    groups = [processes.new_group([ranks[place] for ranks in copies]) for place in range(held.size)]
    try:
        yield ProcessGroup(copies.index(held.ranks), len(copies), held, size, (groups[held.rank],))
    finally:
        processes.destroy_process_group(groups[held.rank])


def _is_worker_of_ray() -> bool:
    """Whether Ray started this process; one that torchrun started may use Ray too."""
    ray = sys.modules.get("ray")
    return ray is not None and "TORCHELASTIC_RUN_ID" not in os.environ and bool(ray.is_initialized())


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """(the store of the environment's processes, rank, size); kept, because others may still be using the store."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))
