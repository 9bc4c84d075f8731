"""dynamic_scale and its backward in CUDA (csrc/cuda/dynamic_scale.cu): one launch forward, two backward at most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import outputs, strides
from ..calls import TYPES
from . import launch


@functools.lru_cache(maxsize=1024)
def _chunks(dtype: torch.dtype, sizes: tuple[int, ...], by_group: bool, device: torch.device) -> int:
    """Partial sums of dw and dc; a closed form of the shape and the (current) device."""
    return int(launch.kernels.dynamic_scale_chunks(TYPES[dtype], sizes, by_group))


def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, D], α [B, T, H]); see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    y, scalars = outputs.dynamic_scale(x)
    B, T, H, D = x.shape
    with launch.on_device_of(x):
        launch.kernels.dynamic_scale(
            type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, x=x, x_stride=x.stride(), out=y,
            out_stride=y.stride(), weight=weight, bias=bias, scalars=scalars, groups=weight.shape[0],
            strength=strength, row_strength=row_strength, group=group, stream=launch.stream_of(x),
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
    """(dx, dweight, dbias), empty where not needed; see `interface.BackendModule`."""
    strides.require_unit_stride(x)
    dy = dy.to(x.dtype)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # the kernel walks along D by ones
    dx, dweight, dbias = outputs.dynamic_scale_gradients(x, weight, need_dx, need_dweight, need_dbias)
    if scalars.numel() == 0 or not (need_dx or need_dweight or need_dbias):
        return dx, dweight.zero_(), dbias.zero_()
    B, T, H, D = x.shape
    with launch.on_device_of(x):
        sums = need_dweight or need_dbias
        chunks = _chunks(x.dtype, tuple(x.shape), group is not None, x.device) if sums else 0
        launch.kernels.dynamic_scale_backward(
            type=TYPES[x.dtype], rows=B, positions=T, heads=H, width=D, dy=dy, dy_stride=dy.stride(),
            d_scalars=d_scalars, d_scalars_stride=None if d_scalars is None else d_scalars.stride(), x=x,
            x_stride=x.stride(), out=dx, out_stride=dx.stride(), weight=weight, scalars=scalars,
            groups=weight.shape[0], strength=strength, row_strength=row_strength, group=group, dweight=dweight,
            dweight_partial=weight.new_empty(chunks * H * D) if need_dweight else None, dbias=dbias,
            dbias_partial=weight.new_empty(chunks * H) if need_dbias else None, stream=launch.stream_of(x),
        )  # fmt: skip
    return dx, dweight, dbias
