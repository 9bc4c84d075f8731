"""Which attention heads this process holds under tensor parallelism, and what others hold, with gradients.

Parameters stay whole in every process. Where they are used, a process takes those of its own heads (`take`); the
gradient then comes back whole, because the processes exchange theirs. What needs all heads gets them by `join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_dtensor


@dataclass(frozen=True)
class OwnHeads:
    """The heads of one layer that this process holds, as one of `size` processes with equally many heads."""

    group: Any  # torch.distributed's process group
    rank: int
    size: int
    count: int  # heads in each process

    def take(self, whole: Tensor, axis: int) -> Tensor:
        """The part of `whole` for the own heads, which lie along an axis; its gradient is that of all processes."""
        return _Take.apply(whole, self, axis)

    def join(self, own: Tensor, axis: int) -> Tensor:
        """The parts of all processes; the gradient, alike in all of them, comes back for the own part."""
        return _Join.apply(own, self, axis)

    def _gather(self, own: Tensor, axis: int) -> Tensor:
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, axis)

    def _own(self, whole: Tensor, axis: int) -> Tensor:
        length = whole.shape[axis] // self.size
        return whole.narrow(axis, self.rank * length, length)


def own_heads(projection: nn.Module | None, n_channels: int, n_heads: int, width: int) -> OwnHeads | None:
    """The heads that this process holds; None: all.

    Args:
        projection: the attention's output projection; None: not known.
        n_channels: the channels of its input in this process.
        n_heads, width: of the whole layer.

    Raises:
        RuntimeError: the input is neither all heads nor an equal share of them.
    """
    if n_channels == n_heads * width:
        return None
    for group, rank, size in _shares(projection):
        if n_heads % size == 0 and n_channels == n_heads // size * width:
            return OwnHeads(group, rank, size, n_heads // size)
    raise RuntimeError(
        f"site: 'head' got {n_channels} channels, expected {n_heads} heads · {width} = {n_heads * width}; each process "
        f"seems to hold only some of the heads (tensor parallelism), but not an equal share, or in a "
        f"{type(projection).__name__} whose weight does not say which; change the plan, or use another site"
    )


def heads_in_process(projection: nn.Module, n_heads: int) -> int:
    """How many of a layer's heads enter the projection in this process, before any forward pass has shown it."""
    for _, _, size in _shares(projection):
        if n_heads % size == 0:
            return n_heads // size
    return n_heads


def _shares(projection: nn.Module | None) -> Iterator[tuple[Any, int, int]]:
    """(group, rank, size) of the processes among which tensor parallelism divides a linear layer's input."""
    weight: Any = getattr(projection, "weight", None)
    if not is_dtensor(weight) or not hasattr(projection, "in_features"):
        return
    mesh = weight.device_mesh
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard(weight.dim() - 1):
            yield mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, heads: OwnHeads, axis: int) -> Tensor:  # type: ignore[override]
        ctx.heads, ctx.axis = heads, axis
        return heads._own(whole, axis).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.heads._gather(dy, ctx.axis), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, heads: OwnHeads, axis: int) -> Tensor:  # type: ignore[override]
        ctx.heads, ctx.axis = heads, axis
        return heads._gather(own, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.heads._own(dy, ctx.axis), None, None
