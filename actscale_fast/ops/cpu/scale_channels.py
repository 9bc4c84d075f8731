"""scale_channels and its backward in C++ (csrc/scale_channels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, strides
from ..addresses import TYPES


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    rows, width, stride = strides.rows_of(x)
    y = x.new_empty(x.shape)
    _C.scale_channels(
        TYPES[x.dtype], rows, width, x.data_ptr(), stride, y.data_ptr(), weight.data_ptr(), torch.get_num_threads()
    )
    return y


def scale_channels_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    rows, width, stride = strides.rows_of(x)
    dy, dy_stride = strides.gradient_rows(dy.to(x.dtype))
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    _C.scale_channels_backward(
        TYPES[x.dtype], rows, width, dy.data_ptr(), dy_stride, x.data_ptr(), stride, dx.data_ptr() if need_dx else 0,
        weight.data_ptr(), dweight.data_ptr() if need_dweight else 0, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight
