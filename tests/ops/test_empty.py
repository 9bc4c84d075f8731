"""Inputs without elements, and axes of one element, lie in memory in ways that no kernel has to read: all are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import Backend, over
from torch import Tensor

from actscale_fast import ops

SHAPES = [
    (0, 3, 2, 4),
    (2, 0, 2, 4),
    (2, 3, 0, 4),
    (2, 3, 2, 0),
    (1, 1, 1, 1),
    (2, 3, 2, 1),
    (2, 1, 1, 4),
    (0, 0, 0, 0),
]


def every_second(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(*shape[:-1], 2 * max(shape[-1], 1))[..., : 2 * shape[-1] : 2]


def transposed(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def expanded(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(*shape[:-1], 1).expand(shape) if shape[-1] else torch.zeros(shape)


def reversed_axes(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))


LAYOUTS = [every_second, transposed, expanded, reversed_axes]


@over(shapes=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["scale_heads", "scale_heads_by_position", "dynamic_scale", "scale_channels"])
def test_scalings_take_empty_and_narrow_activations_of_any_strides(
    backend: Backend, shape: tuple[int, ...], layout: Callable[[tuple[int, ...]], Tensor], op: str
) -> None:
    _, T, H, D = shape
    x = layout(shape).to(backend.device).detach().requires_grad_()

    def parameter(*sizes: int) -> Tensor:
        return torch.ones(sizes, device=backend.device, requires_grad=True)

    if op == "scale_heads":
        leaves = [x, parameter(1, 1, H)]
        y = ops.scale_heads(*leaves)
    elif op == "scale_heads_by_position":
        leaves = [x, parameter(1, T, H), parameter(1, 1, H, D)]
        y = ops.scale_heads(x, leaves[1], shift=leaves[2])
    else:
        leaves = [x, parameter(H, D) if op == "dynamic_scale" else parameter(D)]
        y = getattr(ops, op)(*leaves)
    assert y.shape == x.shape
    for upstream in (torch.ones_like(y), y.new_ones(()).expand(y.shape), reversed_axes(shape).to(y)):
        gradients = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
        if x.numel() == 0:
            assert not any(g.any() for g in gradients)


@over(shapes=[(0, 5), (3, 1), (1, 1), (0, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_take_empty_and_narrow_logits_of_any_strides(
    backend: Backend, shape: tuple[int, int], layout: Callable[[tuple[int, ...]], Tensor]
) -> None:
    logits = layout(shape).to(backend.device).detach().requires_grad_()
    reference = torch.zeros(shape, device=backend.device)
    weight = torch.zeros(3, shape[1], device=backend.device, requires_grad=True)
    for reduction in ("none", "mean"):
        losses = [
            ops.kl_div_from_logits(logits, reference, reduction=reduction),  # type: ignore[arg-type]
            ops.linear_kl_div(logits, weight, reference, reduction=reduction),  # type: ignore[arg-type]
        ]
        for loss in losses:
            assert not loss.any()
            loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
