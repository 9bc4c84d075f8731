"""Several processes on one fit or one sweep, as torchrun and accelerate start them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that work together, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def part(self, work: Sequence[T]) -> list[T]:
        """This process's share of some work, every size-th piece."""
        return list(work[self.rank :: self.size])

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their sums over all processes, the same bits in each, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """One object of each process, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


ALONE = World()


def join(distributed: bool | None) -> World:
    """The world of this call.

    Args:
        distributed: None: the process group that exists, or the one that torchrun or accelerate's environment
            describes (gloo for the CPU, nccl for GPUs); alone without either. False: alone in any case.

    Raises:
        RuntimeError: True without a group and without that environment.
    """
    from torch import distributed as processes

    if distributed is False or (distributed is None and not processes.is_available()):
        return ALONE
    if not processes.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
            if distributed:
                raise RuntimeError("distributed: there is one process only; start several with torchrun or accelerate")
            return ALONE
        # Both where there are GPUs: the model may be on the CPU all the same, and objects travel by gloo.
        on_gpus = torch.cuda.is_available() and processes.is_nccl_available()
        processes.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    return World(processes.get_rank(), processes.get_world_size())
