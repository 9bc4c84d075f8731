"""The part of a vocabulary that this process holds, and the exchange of sums and columns between the processes.

Every exchange is a collective operation: all processes of the group must make it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed as processes

from ..reference import accumulation_dtype
from .linear_logits import BUFFERS_PLAIN_SOFTCAP, slices


@dataclass(frozen=True)
class VocabularyShard:
    """The part of a vocabulary whose rows of W this process holds."""

    group: Any  # torch.distributed's process group
    rank: int  # of this process in the group
    size: int  # processes
    vocab: int  # V

    @property
    def largest(self) -> int:
        """Tokens of the largest part; all have as many, but the last ones."""
        return -(-self.vocab // self.size)

    @property
    def offset(self) -> int:
        """The first token of the own part."""
        return min(self.rank * self.largest, self.vocab)

    @property
    def count(self) -> int:
        """Tokens of the own part, which may be none."""
        return min(self.largest, self.vocab - self.offset)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the ids within the own part, 0 elsewhere; whether they are in it)."""
        inside = (ids >= self.offset) & (ids < self.offset + self.count)
        return torch.where(inside, ids - self.offset, 0), inside

    def sum_(self, x: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes."""
        processes.all_reduce(x, group=self.group)
        return x

    def largest_(self, x: Tensor) -> Tensor:
        """Replace a tensor by its largest values in the processes."""
        processes.all_reduce(x, processes.ReduceOp.MAX, group=self.group)
        return x

    def join(self, own: Tensor) -> Tensor:
        """[..., V] from the own columns; its gradient, alike in all processes, comes back for the own columns."""
        return _Join.apply(own, self)

    def total(self, own: Tensor) -> Tensor:
        """The sum over the processes, whose gradient is alike in all of them."""
        return _Total.apply(own, self)

    def shared(self, x: Tensor) -> Tensor:
        """`x`, which is alike in all processes; its gradient is the sum of theirs."""
        return _Shared.apply(x, self)

    def slices(self, hidden: Tensor, chunk_bytes: int) -> Iterator[slice]:
        """Slices of rows, alike in all processes, whose logits of one part fit into `chunk_bytes`."""
        row = BUFFERS_PLAIN_SOFTCAP * self.largest * accumulation_dtype(hidden.dtype).itemsize
        return slices(hidden.shape[0], max(1, chunk_bytes // row))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: VocabularyShard) -> Tensor:  # type: ignore[override]
        ctx.shard = shard
        padded = torch.nn.functional.pad(own, (0, shard.largest - shard.count)).contiguous()
        parts = [torch.empty_like(padded) for _ in range(shard.size)]
        processes.all_gather(parts, padded, group=shard.group)
        return torch.cat(parts, -1)[..., : shard.vocab]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy.narrow(-1, ctx.shard.offset, ctx.shard.count), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: VocabularyShard) -> Tensor:  # type: ignore[override]
        return shard.sum_(own.clone())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: VocabularyShard) -> Tensor:  # type: ignore[override]
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.shard.sum_(dy.clone(memory_format=torch.contiguous_format)), None
