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
from torch import Tensor

from .._log import notice

T = TypeVar("T")

#: Numbers the groups of this process, so that no two share the keys by which their members find each other.
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """The processes of one call, and the rank of this one among them."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def shard(self, work: Sequence[T]) -> list[T]:
        """The part of the work that this process does: every size-th piece."""
        return list(work[self.rank :: self.size])

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their sums over all processes, in one message; all get the same bits."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def all_gather(self, value: Any) -> list[Any]:
        """The objects of all processes, ordered by rank, in every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def refuse_different(self, value: Any, what: str) -> None:
        """Raise a ValueError in every process if they do not all have the same value."""
        if any(other != value for other in self.all_gather(value)):
            raise ValueError(
                f"distributed: the processes have different {what}; pass distributed=False if each works alone"
            )


SINGLE_PROCESS = ProcessGroup()


@contextlib.contextmanager
def process_group(distributed: bool | None) -> Iterator[ProcessGroup]:
    """The processes that share a call; a group that is created here is destroyed at the end.

    Args:
        distributed: None: use the existing process group, or create the one that the environment of torchrun or
            accelerate describes (gloo for CPUs, nccl for GPUs); without either, work alone, and so in a worker of Ray,
            whose ranks serve other purposes. True: use the group or the environment, but raise if there is only one
            process. False: work alone.

    Raises:
        RuntimeError: `distributed` is True, and there is neither a group nor such an environment.
    """
    from torch import distributed as processes

    available = distributed is not False and processes.is_available()
    if available and distributed is None and _is_worker_of_ray():
        if processes.is_initialized() or "RANK" in os.environ:
            notice("this worker of Ray works alone; distributed=True shares the work with the others")
        available = False
    if available and processes.is_initialized():
        yield ProcessGroup(processes.get_rank(), processes.get_world_size())
    elif available and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        # Both backends where there are GPUs: the model may still be on the CPU, and objects are sent through gloo.
        on_gpus = torch.cuda.is_available() and processes.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        store, rank, size = _rendezvous()
        store = processes.PrefixStore(f"actscale_fast/{next(_numbers)}", store)
        processes.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            yield ProcessGroup(rank, size)
        finally:
            processes.destroy_process_group()
    elif distributed:
        raise RuntimeError("distributed: there is one process only; start several with torchrun or accelerate")
    else:
        yield SINGLE_PROCESS


def _is_worker_of_ray() -> bool:
    """Whether Ray started this process; one that torchrun started may use Ray too."""
    ray = sys.modules.get("ray")
    return ray is not None and "TORCHELASTIC_RUN_ID" not in os.environ and bool(ray.is_initialized())


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """(the store of the environment's processes, rank, size); kept, because others may still be using the store."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))
