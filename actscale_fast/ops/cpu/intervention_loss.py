"""The losses from logits in C++ (csrc/intervention_loss.h, scale_gradient.h, scalars.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..addresses import TYPES, address

#: Bytes of a gradient that is worth keeping for the next one, and of one too large to hold on to.
KEPT_FROM, KEPT_UP_TO = 1 << 20, 64 << 20


def _gradient_like(logits: Tensor) -> Tensor:
    """An uninitialised tensor of the logits' shape; a large one lies in a kept block (csrc/kept_memory.h)."""
    n_bytes = logits.numel() * logits.element_size()
    if not KEPT_FROM <= n_bytes <= KEPT_UP_TO:
        return logits.new_empty(logits.shape)
    flat = torch.frombuffer(_C.KeptMemory(n_bytes), dtype=logits.dtype, count=logits.numel())
    return flat.resize_(logits.shape)  # not view(): a gradient that is a view would be copied when it is accumulated


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
    n_rows, vocab = logits.shape
    effectiveness = logits.new_empty(n_rows, dtype=torch.float32)
    faithfulness = torch.empty_like(effectiveness)
    grad = logits.detach() if in_place else _gradient_like(logits) if need_grad else logits.new_empty(0)
    answer_grad = effectiveness.new_empty((n_rows, 3) if need_grad else (0,))
    _C.intervention_loss(
        TYPES[logits.dtype], n_rows, vocab, logits.data_ptr(), logits.stride(0), reference_logits.data_ptr(),
        reference_logits.stride(0), address(correct), address(wrong), address(direction), address(row_weight), margin,
        inverse_temperature, softcap or 0.0, exclude_answers, reverse, effectiveness.data_ptr(),
        faithfulness.data_ptr(), grad.data_ptr() if need_grad else 0, answer_grad.data_ptr() if need_grad else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    l1 = effectiveness.new_empty(() if scalars is not None else (0,))
    sign = torch.empty_like(scalars) if scalars is not None and need_grad else effectiveness.new_empty(0)
    if scalars is not None:
        _C.l1_norm(scalars.data_ptr(), sign.data_ptr() if need_grad else 0, l1.data_ptr(), scalars.numel())
    return effectiveness, faithfulness, grad, answer_grad, l1, sign


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    _C.scale_gradient(
        TYPES[grad.dtype], *grad.shape, grad.data_ptr(), d_effectiveness.data_ptr(), d_effectiveness.stride(0),
        d_faithfulness.data_ptr(), d_faithfulness.stride(0), address(correct), address(wrong), answer_grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
