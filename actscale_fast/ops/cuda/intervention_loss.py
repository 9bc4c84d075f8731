"""The losses from logits in CUDA (csrc/cuda_loss.cu, cuda_scale_gradient.cu): one launch a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..addresses import TYPES, address
from . import launch


def intervention_loss(
    logits: Tensor,
    reference_logits: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    direction: Tensor | None,
    scalars: Tensor | None,
    margin: float,
    inverse_temperature: float,
    exclude_answers: bool,
    reverse: bool,
    need_grad: bool,
    row_weight: Tensor | None = None,
    softcap: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, grad, answer_grad, l1, sign); see `interface.BackendModule`."""
    n_rows, vocab = logits.shape
    effectiveness = logits.new_empty(n_rows, dtype=torch.float32)
    faithfulness = torch.empty_like(effectiveness)
    grad = logits.detach() if in_place else logits.new_empty(logits.shape if need_grad else (0,))
    answer_grad = effectiveness.new_empty((n_rows, 3) if need_grad else (0,))
    l1 = effectiveness.new_empty(() if scalars is not None else (0,))
    sign = torch.empty_like(scalars) if scalars is not None and need_grad else effectiveness.new_empty(0)
    with launch.on_device_of(logits):
        launch.kernels.intervention_loss(
            TYPES[logits.dtype], n_rows, vocab, logits.data_ptr(), logits.stride(0), reference_logits.data_ptr(),
            reference_logits.stride(0), address(correct), address(wrong), address(direction), address(row_weight),
            margin, inverse_temperature, softcap or 0.0, exclude_answers, reverse, effectiveness.data_ptr(),
            faithfulness.data_ptr(), grad.data_ptr() if need_grad else 0, answer_grad.data_ptr() if need_grad else 0,
            address(scalars), scalars is not None, 0 if scalars is None else scalars.numel(), l1.data_ptr(),
            sign.data_ptr() if need_grad else 0, launch.stream_of(logits),
        )  # fmt: skip
    return effectiveness, faithfulness, grad, answer_grad, l1, sign


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    """Scales each row of `grad` in place; see `interface.BackendModule`."""
    with launch.on_device_of(grad):
        launch.kernels.scale_gradient(
            TYPES[grad.dtype], *grad.shape, grad.data_ptr(), d_effectiveness.data_ptr(), d_effectiveness.stride(0),
            d_faithfulness.data_ptr(), d_faithfulness.stride(0), address(correct), address(wrong),
            answer_grad.data_ptr(), launch.stream_of(grad),
        )  # fmt: skip
