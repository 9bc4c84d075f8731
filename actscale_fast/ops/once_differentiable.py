"""An op whose gradient is differentiated again raises, instead of giving a result that lacks a part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a Function's backward: gradients that are differentiated again (a gradient penalty) raise.

    `torch.autograd.function.once_differentiable` raises only where the upstream gradient requires a gradient. That of a
    loss is a constant 1, and the penalty's part would be missing without a message.

    Args:
        op: the name in the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: Any) -> Any:
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            # Grad mode is on under create_graph=True. A compiler traces backward passes with it on, and refuses a
            # second derivative itself.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return gradients
            # Above the forward's leaves, so that torch.autograd.grad by one of them passes the error too.
            return _Refused.apply(op, len(gradients), *gradients, *upstream, *_leaves_below(ctx))

        return wrapper

    return decorate


class _Refused(torch.autograd.Function):
    """The first `count` tensors as they are; their backward raises."""

    @staticmethod
    def forward(ctx: Any, op, count, *tensors):  # type: ignore[no-untyped-def]
        ctx.op = op
        return tuple(None if t is None else t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            f"{ctx.op}: its gradient (create_graph=True) was differentiated, but the op is once differentiable"
        )


def _leaves_below(node: torch.autograd.graph.Node) -> list[Tensor]:
    """The tensors whose gradients a backward pass through `node` accumulates."""
    seen, waiting, leaves = {node}, [node], []
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is None or below in seen:
                continue
            seen.add(below)
            waiting.append(below)
            if below.name() == "torch::autograd::AccumulateGrad":
                leaves.append(below.variable)  # type: ignore[attr-defined]
    return leaves
