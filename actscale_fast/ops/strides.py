"""How scaled activations lie in memory: one rule for the kernels, their gradients and their fakes."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like(x: Tensor) -> Tensor:
    """Laid out as `torch.empty_like(x)` where that has unit stride over the last axis, else contiguous.

    PyTorch sorts the axes of an x that overlaps itself (`base.unfold`) by its strides, and ties may put D outside.
    """
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """(N, d, the stride of rows) of x [..., d]: contiguous, or [N, d] with unit stride over d; ValueError otherwise."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if x.is_contiguous():
        return rows, width, width
    if x.dim() == 2 and (x.stride(1) == 1 or width <= 1):
        return rows, width, x.stride(0)
    raise ValueError(f"x: got strides {x.stride()}, expected contiguous or [N, d] with stride 1 over d")


def gradient_rows(dy: Tensor) -> tuple[Tensor, int]:
    """dy [..., d] as rows of unit stride, and the stride between them; copied where it does not lie so."""
    if dy.is_contiguous():
        return dy, dy.shape[-1]
    dy = dy.flatten(0, -2) if dy.dim() > 2 else dy.unsqueeze(0) if dy.dim() == 1 else dy
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    return dy, dy.stride(0)


def require_unit_stride(x: Tensor) -> None:
    """Refuses what the kernels would read past; the public function has made it contiguous.

    Nothing is read of an empty x, whatever its strides: PyTorch calls it contiguous, and `contiguous()` keeps them.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(f"x: got strides {x.stride()}, expected 1 over the last axis; call contiguous() first")
