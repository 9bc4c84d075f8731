"""scale_channels and its backward in C++ (csrc/cpu/scale_channels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, outputs, strides  # type: ignore[attr-defined]
from ..calls import TYPES


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    rows, width, stride = strides.rows_of(x)
    y = x.new_empty(x.shape)
    _C.scale_channels(
        type=TYPES[x.dtype], rows=rows, width=width, x=x, x_stride=stride, out=y, weight=weight,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return y


def scale_channels_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    rows, width, stride = strides.rows_of(x)
    dy, dy_stride = strides.gradient_rows(dy.to(x.dtype))
    dx, dweight = outputs.scale_channels_gradients(x, weight, need_dx, need_dweight)
    _C.scale_channels_backward(
        type=TYPES[x.dtype], rows=rows, width=width, dy=dy, dy_stride=dy_stride, x=x, x_stride=stride, out=dx,
        weight=weight, dweight=dweight, threads=torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight
