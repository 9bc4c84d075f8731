"""The update of the scalars in CUDA (csrc/cuda_proximal.cu)."""

from __future__ import annotations

from torch import Tensor

from . import launch


def proximal_adam_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l1: float,
) -> None:
    """One step in place; see `reference.proximal_adam_`."""
    with launch.on_device_of(parameter):
        launch.kernels.proximal_adam(
            parameter.numel(), parameter.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
            step.data_ptr(), lr, beta1, beta2, eps, l1, launch.stream_of(parameter),
        )  # fmt: skip
