"""What a launch has to know of its device, asked once per process."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

#: Given to every launch: sums of products are contracted, whatever this version of Triton does by default.
OPTIONS = {"enable_fp_fusion": True}

#: Taken for a device that has none (the interpreter's CPU): enough for a small test to split its rows.
NO_GPU_PROCESSORS = 4


@functools.cache
def processors(device: torch.device) -> int:
    """The device's streaming multiprocessors (CUDA), compute units (ROCm) or subslices (XPU)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return int(getattr(properties, "gpu_subslice_count", 0) or properties.max_compute_units)
    return NO_GPU_PROCESSORS


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s device the current one: Triton launches there, whichever device its arguments lie on."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.device.type == "xpu" and x.device.index != torch.xpu.current_device():
        return torch.xpu.device(x.device)
    return contextlib.nullcontext()


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉ of integers."""
    return -(-a // b)
