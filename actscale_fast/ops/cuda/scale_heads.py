"""scale_heads and its backward in CUDA (csrc/cuda/scale_heads.cu): one launch forward, two backward at most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import outputs, strides
from ..calls import TYPES, extents
from . import launch


@functools.lru_cache(maxsize=1024)
def _partials(dtype: torch.dtype, sizes: tuple[int, ...], by_position: bool, device: torch.device) -> tuple[int, int]:
    """Floats of the partial sums of dα and dv; a closed form of the shape and the (current) device."""
    return launch.kernels.scale_heads_partials(TYPES[dtype], sizes, by_position)


def scale_heads(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """y [B, T, H, D]; see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    y = outputs.like(x)
    B, T, H, D = x.shape
    G, alpha_positions, shift_positions = extents(alpha, shift)
    with launch.on_device_of(x):
        launch.kernels.scale_heads(
            type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, x=x, x_stride=x.stride(), out=y,
            out_stride=y.stride(), alpha=alpha, shift=shift, groups=G, alpha_positions=alpha_positions,
            shift_positions=shift_positions, strength=strength, row_strength=row_strength, group=group,
            stream=launch.stream_of(x),
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
    """(dx, dalpha, dshift), empty where not needed; see `interface.BackendModule`."""
    if need_dalpha:
        strides.require_unit_stride(x)
    dy = dy.to(x.dtype)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # the kernel walks along D by ones
    dx, dalpha, dshift = outputs.scale_heads_gradients(x, alpha, shift, need_dx, need_dalpha, need_dshift)
    if x.numel() == 0 or not (need_dx or need_dalpha or need_dshift):
        return dx, dalpha.zero_(), dshift.zero_()
    B, T, H, D = x.shape
    G, alpha_positions, shift_positions = extents(alpha, shift)
    by_position = alpha_positions > 1 or shift_positions > 1
    with launch.on_device_of(x):
        floats = _partials(x.dtype, tuple(x.shape), by_position, x.device) if need_dalpha or need_dshift else (0, 0)
        launch.kernels.scale_heads_backward(
            type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, dy=dy, dy_stride=dy.stride(), x=x,
            x_stride=x.stride(), out=dx, out_stride=dx.stride(), alpha=alpha, shift=None, groups=G,
            alpha_positions=alpha_positions, shift_positions=shift_positions, strength=strength,
            row_strength=row_strength, group=group, dalpha=dalpha, dshift=dshift,
            dalpha_partial=dalpha.new_empty(floats[0]) if dalpha.numel() else None,
            dshift_partial=dshift.new_empty(floats[1]) if dshift.numel() else None, stream=launch.stream_of(x),
        )  # fmt: skip
    return dx, dalpha, dshift
