"""The update of the scalars in CUDA (csrc/cuda/proximal_adam.cu)."""

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
        launch.kernels.proximal_adam_(
            count=parameter.numel(), parameter=parameter, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, l1=l1, stream=launch.stream_of(parameter),
        )  # fmt: skip
