"""What every launch needs: the extension's CUDA kernels, the tensor's device made current, and its stream."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]

#: The submodule of launchers; absent where the extension was built without CUDA (`backends.unavailable` says so first).
kernels: Any = getattr(_C, "cuda", None)

_NOTHING = contextlib.nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s device the current one, where the launchers launch."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NOTHING


def stream_of(x: Tensor) -> int:
    """The address of the current stream of `x`'s device; 0 for the emulated device, whose tensors lie on the CPU."""
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0
