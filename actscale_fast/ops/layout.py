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


def require_unit_stride(x: Tensor) -> None:
    """Refuses what the kernels would read past; the public function has made it contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x: got strides {x.stride()}, expected 1 over the last axis; call contiguous() first")
