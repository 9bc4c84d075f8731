"""The losses from logits in C++ (csrc/cpu/intervention_loss.h, intervention_loss_scale.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, outputs  # type: ignore[attr-defined]
from ..calls import TYPES

#: Bytes of a gradient that is worth keeping for the next one, and of one too large to hold on to.
KEPT_FROM, KEPT_UP_TO = 1 << 20, 64 << 20


def _gradient_like(logits: Tensor) -> Tensor:
    """An uninitialised tensor of the logits' shape; a large one lies in a kept block (csrc/cpu/kept_memory.h)."""
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
    gradient = logits.detach() if in_place else _gradient_like(logits) if need_grad else None
    results = outputs.intervention_loss(logits, scalars, need_grad, gradient)
    effectiveness, faithfulness, grad, answer_grad, l1, sign = results
    rows, vocab = logits.shape
    _C.intervention_loss(
        type=TYPES[logits.dtype], rows=rows, vocab=vocab, logits=logits, logits_stride=logits.stride(0),
        reference=reference_logits, reference_stride=reference_logits.stride(0), correct=correct, wrong=wrong,
        direction=direction, row_weight=row_weight, margin=margin, inverse_temperature=inverse_temperature,
        softcap=softcap, exclude_answers=exclude_answers, reverse=reverse, effectiveness=effectiveness,
        faithfulness=faithfulness, grad=grad, answer_grad=answer_grad, scalars=scalars,
        n_scalars=None if scalars is None else scalars.numel(), l1=l1, sign=sign, threads=torch.get_num_threads(),
    )  # fmt: skip
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
        type=TYPES[grad.dtype], rows=rows, vocab=vocab, grad=grad, d_effectiveness=d_effectiveness,
        d_effectiveness_stride=d_effectiveness.stride(0), d_faithfulness=d_faithfulness,
        d_faithfulness_stride=d_faithfulness.stride(0), correct=correct, wrong=wrong, answer_grad=answer_grad,
        threads=torch.get_num_threads(),
    )  # fmt: skip
