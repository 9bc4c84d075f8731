"""scale_heads and its backward in CUDA (csrc/cuda_scale_heads.cu): one launch forward, two backward at most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import strides
from ..addresses import TYPES, address, extents
from . import launch


@functools.lru_cache(maxsize=1024)
def _partials(
    dtype: torch.dtype, sizes: tuple[int, ...], groups: tuple[int, int, int], device: torch.device
) -> tuple[int, int]:
    """Floats of the partial sums of dα and dv; a closed form of the shape and the (current) device."""
    return launch.kernels.scale_heads_partials(TYPES[dtype], sizes, groups)


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
    y = strides.empty_like(x)
    with launch.on_device_of(x):
        launch.kernels.scale_heads(
            TYPES[x.dtype], tuple(x.shape), x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3],
            address(alpha), address(shift), extents(alpha, shift), strength, address(row_strength), address(group),
            launch.stream_of(x),
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
    fresh = torch.zeros_like if x.numel() == 0 else torch.empty_like
    nothing = x.new_empty(0, dtype=torch.float32)
    dx = strides.empty_like(x) if need_dx else x.new_empty(0)
    dalpha = fresh(alpha) if need_dalpha and alpha is not None else nothing
    dshift = fresh(shift) if need_dshift and shift is not None else nothing
    if x.numel() == 0 or not (need_dx or need_dalpha or need_dshift):
        return dx, dalpha, dshift
    sizes, groups = tuple(x.shape), extents(alpha, shift)
    with launch.on_device_of(x):
        floats = _partials(x.dtype, sizes, groups, x.device) if need_dalpha or need_dshift else (0, 0)
        dalpha_partial = nothing.new_empty(floats[0]) if dalpha is not nothing else nothing
        dshift_partial = nothing.new_empty(floats[1]) if dshift is not nothing else nothing
        launch.kernels.scale_heads_backward(
            TYPES[x.dtype], sizes, dy.data_ptr(), dy.stride(), x.data_ptr(), x.stride()[:3],
            dx.data_ptr() if need_dx else 0, dx.stride()[:3], address(alpha), groups, strength,
            address(row_strength), address(group), dalpha.data_ptr(), dalpha_partial.data_ptr(), dshift.data_ptr(),
            dshift_partial.data_ptr(), launch.stream_of(x),
        )  # fmt: skip
    return dx, dalpha, dshift
