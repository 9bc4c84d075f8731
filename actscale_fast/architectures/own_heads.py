"""Which attention heads this process holds under tensor parallelism, and what others hold, with gradients.

Parameters stay whole in every process. Where they are used, a process takes those of its own heads (`take`); the
gradient then comes back whole, because the processes exchange theirs. What needs all heads gets them by `join`.
"""

from __future__ import annotations

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
        return whole if whole.shape[axis] == 1 else _Take.apply(whole, self, axis)

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


def own_heads(projection: nn.Module, n_channels: int, n_heads: int, width: int) -> OwnHeads | None:
    """The heads that this process holds; None: all.

    Args:
        projection: the attention's output projection.
        n_channels: the channels of its input in this process.
        n_heads, width: of the whole layer.

    Raises:
        RuntimeError: the input is neither all heads nor an equal share of them.
    """
    if n_channels == n_heads * width:
        return None
    weight: Any = getattr(projection, "weight", None)
    if is_dtensor(weight):
        mesh, input_axis = weight.device_mesh, 1 if isinstance(projection, nn.Linear) else 0
        for axis, placement in enumerate(weight.placements):
            size = mesh.size(axis)
            if placement.is_shard(input_axis) and n_heads % size == 0 and n_channels == n_heads // size * width:
                return OwnHeads(mesh.get_group(axis), mesh.get_local_rank(axis), size, n_heads // size)
    raise RuntimeError(
        f"site: 'head' got {n_channels} channels, expected {n_heads} heads · {width} = {n_heads * width}; each process "
        f"seems to hold only some of the heads (tensor parallelism), but not an equal share, or in a "
        f"{type(projection).__name__} whose weight does not say which; change the plan, or use another site"
    )


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
