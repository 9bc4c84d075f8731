"""dynamic_scale and its backward in CUDA (csrc/cuda_dynamic_scale.cu): one launch forward, two backward at most."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import strides
from ..addresses import TYPES, address
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
    y, scalars = strides.empty_like(x), x.new_empty(x.shape[:3], dtype=torch.float32)
    with launch.on_device_of(x):
        launch.kernels.dynamic_scale(
            TYPES[x.dtype], tuple(x.shape), x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3],
            weight.data_ptr(), address(bias), scalars.data_ptr(), weight.shape[0], strength, address(row_strength),
            address(group), launch.stream_of(x),
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
    nothing = weight.new_empty(0)
    fresh = torch.zeros if scalars.numel() == 0 else torch.empty
    options = {"dtype": torch.float32, "device": x.device}
    dx = strides.empty_like(x) if need_dx else x.new_empty(0)
    dweight = fresh(weight.shape, **options) if need_dweight else nothing  # type: ignore[call-overload]
    dbias = fresh(weight.shape[:2], **options) if need_dbias else nothing  # type: ignore[call-overload]
    if scalars.numel() == 0 or not (need_dx or need_dweight or need_dbias):
        return dx, dweight, dbias
    sizes = tuple(x.shape)
    with launch.on_device_of(x):
        chunks = _chunks(x.dtype, sizes, group is not None, x.device) if need_dweight or need_dbias else 0
        dweight_partial = weight.new_empty(chunks * sizes[2] * sizes[3]) if need_dweight else nothing
        dbias_partial = weight.new_empty(chunks * sizes[2]) if need_dbias else nothing
        launch.kernels.dynamic_scale_backward(
            TYPES[x.dtype], sizes, dy.data_ptr(), dy.stride(), address(d_scalars),
            (0, 0, 0) if d_scalars is None else d_scalars.stride(), x.data_ptr(), x.stride()[:3],
            dx.data_ptr() if need_dx else 0, dx.stride()[:3], weight.data_ptr(), scalars.data_ptr(), weight.shape[0],
            strength, address(row_strength), address(group), dweight.data_ptr(), dweight_partial.data_ptr(),
            dbias.data_ptr(), dbias_partial.data_ptr(), launch.stream_of(x),
        )  # fmt: skip
    return dx, dweight, dbias
