"""dynamic_scale and its backward in C++ (csrc/cpu/dynamic_scale.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, outputs, strides  # type: ignore[attr-defined]
from ..calls import TYPES


def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> tuple[Tensor, Tensor]:
    strides.require_unit_stride(x)
    y, scalars = outputs.dynamic_scale(x)
    B, T, H, D = x.shape
    _C.dynamic_scale(
        type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, x=x, x_stride=x.stride(), out=y,
        out_stride=y.stride(), weight=weight, bias=bias, scalars=scalars, groups=weight.shape[0], strength=strength,
        row_strength=row_strength, group=group, threads=torch.get_num_threads(),
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
    dx, dweight, dbias = outputs.dynamic_scale_gradients(x, weight, need_dx, need_dweight, need_dbias)
    B, T, H, D = x.shape
    _C.dynamic_scale_backward(
        type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, dy=dy, dy_stride=dy.stride(), d_scalars=d_scalars,
        d_scalars_stride=None if d_scalars is None else d_scalars.stride(), x=x, x_stride=x.stride(), out=dx,
        out_stride=dx.stride(), weight=weight, scalars=scalars, groups=weight.shape[0], strength=strength,
        row_strength=row_strength, group=group, dweight=dweight, dbias=dbias, threads=torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias
