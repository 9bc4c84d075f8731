"""How tensors reach the extension, C++ and CUDA: as addresses and a number for the type."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def extents(alpha: Tensor | None, shift: Tensor | None) -> tuple[int, int, int]:
    """(G, P of α, P of v); P of one that is absent is 1."""
    present = alpha if alpha is not None else shift
    assert present is not None, "the public function asks for one of the two"
    return present.shape[0], 1 if alpha is None else alpha.shape[1], 1 if shift is None else shift.shape[1]
