"""The losses from logits in C++ (csrc/cpu/intervention_loss.h, intervention_loss_scale.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, calls, outputs  # type: ignore[attr-defined]
from ..interface import LossArguments

#: Bytes of a gradient that is worth keeping for the next one, and of one too large to hold on to.
KEPT_FROM, KEPT_UP_TO = 1 << 20, 64 << 20


def _gradient_like(logits: Tensor) -> Tensor:
    """An uninitialised tensor of the logits' shape; a large one lies in a kept block (csrc/cpu/kept_memory.h)."""
    n_bytes = logits.numel() * logits.element_size()
    if not KEPT_FROM <= n_bytes <= KEPT_UP_TO:
        return logits.new_empty(logits.shape)
    flat = torch.frombuffer(_C.KeptMemory(n_bytes), dtype=logits.dtype, count=logits.numel())
    return flat.resize_(logits.shape)  # not view(): a gradient that is a view would be copied when it is accumulated


def intervention_loss(*arguments: Any, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = LossArguments(*arguments)
    logits, need_grad = call.logits, call.need_grad
    gradient = logits.detach() if in_place else _gradient_like(logits) if need_grad else None
    results = outputs.intervention_loss(logits, call.scalars, need_grad, gradient)
    _C.intervention_loss(**calls.intervention_loss(call, results), threads=torch.get_num_threads())
    return results


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    rows, vocab = grad.shape
    _C.intervention_loss_scale_(
        type=calls.TYPES[grad.dtype], rows=rows, vocab=vocab, grad=grad, d_effectiveness=d_effectiveness,
        d_effectiveness_stride=d_effectiveness.stride(0), d_faithfulness=d_faithfulness,
        d_faithfulness_stride=d_faithfulness.stride(0), correct=correct, wrong=wrong, answer_grad=answer_grad,
        threads=torch.get_num_threads(),
    )  # fmt: skip
