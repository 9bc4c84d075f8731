"""The update of the scalars in C++ (csrc/scalars.h)."""

from __future__ import annotations

from torch import Tensor

from .. import _C


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
    _C.proximal_adam(
        parameter.numel(), parameter.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        step.data_ptr(), lr, beta1, beta2, eps, l1,
    )  # fmt: skip
