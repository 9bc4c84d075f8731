"""What the calls into the extension, C++ and CUDA, share. Their keyword arguments are the fields of csrc/calls.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .interface import LossArguments

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def extents(alpha: Tensor | None, shift: Tensor | None) -> tuple[int, int, int]:
    """(G, P of α, P of v); P of one that is absent is 1."""
    present = alpha if alpha is not None else shift
    assert present is not None, "the public function asks for one of the two"
    return present.shape[0], 1 if alpha is None else alpha.shape[1], 1 if shift is None else shift.shape[1]


def intervention_loss(call: LossArguments, results: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of `InterventionLoss`; `results` as `outputs.intervention_loss` makes them."""
    logits, reference, scalars = call.logits, call.reference_logits, call.scalars
    names = ("effectiveness", "faithfulness", "grad", "answer_grad", "l1", "sign")
    return dict(
        type=TYPES[logits.dtype], rows=logits.shape[0], vocab=logits.shape[1], logits=logits,
        logits_stride=logits.stride(0), reference=reference, reference_stride=reference.stride(0),
        correct=call.correct, wrong=call.wrong, direction=call.direction, row_weight=call.row_weight,
        gradient_weight=call.gradient_weight, margin=call.margin, softcap=call.softcap,
        inverse_temperature=call.inverse_temperature, exclude_answers=call.exclude_answers, reverse=call.reverse,
        scalars=scalars, n_scalars=None if scalars is None else scalars.numel(),
        **dict(zip(names, results, strict=True)),
    )  # fmt: skip
