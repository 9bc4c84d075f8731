"""scale_channels and its backward in CUDA (csrc/cuda/scale_channels.cu): one launch forward, two backward at most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import outputs, strides
from ..calls import TYPES
from . import launch


@functools.lru_cache(maxsize=1024)
def _parts(dtype: torch.dtype, rows: int, width: int, device: torch.device) -> int:
    """Partial sums of dw; a closed form of the shape and the (current) device."""
    return int(launch.kernels.scale_channels_parts(TYPES[dtype], rows, width))


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    """y [..., d]; see `interface.BackendModule`."""
    rows, width, stride = strides.rows_of(x)
    y = x.new_empty(x.shape)
    with launch.on_device_of(x):
        launch.kernels.scale_channels(
            type=TYPES[x.dtype], rows=rows, width=width, x=x, x_stride=stride, out=y, weight=weight,
            stream=launch.stream_of(x),
        )  # fmt: skip
    return y


def scale_channels_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), empty where not needed; see `interface.BackendModule`."""
    rows, width, stride = strides.rows_of(x)
    dx, dweight = outputs.scale_channels_gradients(x, weight, need_dx, need_dweight)
    if x.numel() == 0 or not (need_dx or need_dweight):
        return dx, dweight.zero_()
    dy, dy_stride = strides.gradient_rows(dy.to(x.dtype))
    with launch.on_device_of(x):
        parts = _parts(x.dtype, rows, width, x.device) if need_dweight else 0
        launch.kernels.scale_channels_backward(
            type=TYPES[x.dtype], rows=rows, width=width, dy=dy, dy_stride=dy_stride, x=x, x_stride=stride,
            out=dx if need_dx else None, weight=weight, dweight=dweight,
            dweight_partial=weight.new_empty(parts * width) if need_dweight else None, stream=launch.stream_of(x),
        )  # fmt: skip
    return dx, dweight
