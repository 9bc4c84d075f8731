"""dynamic_scale and its backward in C++ (csrc/dynamic_scale.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, strides
from ..addresses import TYPES, address


def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> tuple[Tensor, Tensor]:
    strides.require_unit_stride(x)
    y, scalars = strides.empty_like(x), x.new_empty(x.shape[:3], dtype=torch.float32)
    _C.dynamic_scale(
        TYPES[x.dtype], tuple(x.shape), x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3],
        weight.data_ptr(), address(bias), scalars.data_ptr(), weight.shape[0], strength, address(row_strength),
        address(group), torch.get_num_threads(),
    )  # fmt: skip
    return y, scalars


def dynamic_scale_backward(
    dy: Tensor,
    d_scalars: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scalars: Tensor,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    strides.require_unit_stride(x)
    dy = dy.to(x.dtype)
    dx = strides.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.empty_like(weight) if need_dweight else weight.new_empty(0)
    dbias = weight.new_empty(weight.shape[:2] if need_dbias else (0,))
    _C.dynamic_scale_backward(
        TYPES[x.dtype], tuple(x.shape), dy.data_ptr(), dy.stride(), address(d_scalars),
        (0, 0, 0) if d_scalars is None else d_scalars.stride(), x.data_ptr(), x.stride()[:3],
        dx.data_ptr() if need_dx else 0, dx.stride()[:3], weight.data_ptr(), scalars.data_ptr(), weight.shape[0],
        strength, address(row_strength), address(group), dweight.data_ptr() if need_dweight else 0,
        dbias.data_ptr() if need_dbias else 0, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias
