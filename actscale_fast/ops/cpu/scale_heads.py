"""scale_heads and its backward in C++ (csrc/scale_heads.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, strides
from ..addresses import TYPES, address, extents


def scale_heads(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    strides.require_unit_stride(x)
    y = strides.empty_like(x)
    _C.scale_heads(
        TYPES[x.dtype], tuple(x.shape), x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3],
        address(alpha), address(shift), extents(alpha, shift), strength, address(row_strength), address(group),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def scale_heads_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
    need_dx: bool,
    need_dalpha: bool,
    need_dshift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if need_dalpha:
        strides.require_unit_stride(x)
    dy = dy.to(x.dtype)
    dx = strides.empty_like(x) if need_dx else x.new_empty(0)
    dalpha = torch.empty_like(alpha) if need_dalpha and alpha is not None else x.new_empty(0, dtype=torch.float32)
    dshift = torch.empty_like(shift) if need_dshift and shift is not None else x.new_empty(0, dtype=torch.float32)
    _C.scale_heads_backward(
        TYPES[x.dtype], tuple(x.shape), dy.data_ptr(), dy.stride(), x.data_ptr(), x.stride()[:3],
        dx.data_ptr() if need_dx else 0, dx.stride()[:3], address(alpha), address(shift), extents(alpha, shift),
        strength, address(row_strength), address(group), dalpha.data_ptr() if need_dalpha else 0,
        dshift.data_ptr() if need_dshift else 0, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalpha, dshift
