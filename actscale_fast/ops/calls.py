"""What the calls into the extension, C++ and CUDA, share. Their keyword arguments are the fields of csrc/calls.h."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def extents(alpha: Tensor | None, shift: Tensor | None) -> tuple[int, int, int]:
    """(G, P of α, P of v); P of one that is absent is 1."""
    present = alpha if alpha is not None else shift
    assert present is not None, "the public function asks for one of the two"
    return present.shape[0], 1 if alpha is None else alpha.shape[1], 1 if shift is None else shift.shape[1]
