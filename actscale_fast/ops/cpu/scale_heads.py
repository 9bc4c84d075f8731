"""scale_heads and its backward in C++ (csrc/cpu/scale_heads.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, outputs, strides  # type: ignore[attr-defined]
from ..calls import TYPES, extents


def scale_heads(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    strides.require_unit_stride(x)
    y = outputs.like(x)
    B, T, H, D = x.shape
    G, alpha_positions, shift_positions = extents(alpha, shift)
    _C.scale_heads(
        type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, x=x, x_stride=x.stride(), out=y,
        out_stride=y.stride(), alpha=alpha, shift=shift, groups=G, alpha_positions=alpha_positions,
        shift_positions=shift_positions, strength=strength, row_strength=row_strength, group=group,
        threads=torch.get_num_threads(),
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
    dx, dalpha, dshift = outputs.scale_heads_gradients(x, alpha, shift, need_dx, need_dalpha, need_dshift)
    B, T, H, D = x.shape
    G, alpha_positions, shift_positions = extents(alpha, shift)
    _C.scale_heads_backward(
        type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, dy=dy, dy_stride=dy.stride(), x=x,
        x_stride=x.stride(), out=dx, out_stride=dx.stride(), alpha=alpha, shift=shift, groups=G,
        alpha_positions=alpha_positions, shift_positions=shift_positions, strength=strength,
        row_strength=row_strength, group=group, dalpha=dalpha, dshift=dshift, threads=torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalpha, dshift
