"""The softmax over a vocabulary from hidden states in C++ (csrc/cpu/linear_softmax_splits.h)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import _C, outputs, verdicts  # type: ignore[attr-defined]
from ..calls import TYPES

#: Scratch for the sums of rows beyond this is not taken, whatever the caller allows: W is read again for every 64 rows
#: anyway. Each thread's block of W comes on top where it leaves no room for 64 rows.
MOST_BYTES = 64 << 20
#: Levels of this processor that are used only where they were measured (csrc/bindings/module.cpp).
LEVELS_BY_VERDICT: tuple[str, ...] = tuple(_C.levels_by_verdict())


def by_verdict(dtype: torch.dtype) -> bool:
    """Whether the verdict on this processor has found such a level right and faster, and no other is forced."""
    if not LEVELS_BY_VERDICT or "ACTSCALE_CPU_LEVEL" in os.environ:
        return False
    choice = (verdicts.choices("cpu", None) or {}).get(("linear_softmax", dtype))
    return choice is not None and choice.level in LEVELS_BY_VERDICT


def linear_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correct: Tensor | None,
    wrong: Tensor | None,
    exclude_answers: bool,
    logit_scale: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_sum, mean, mean_bias, answers = outputs.linear_softmax(hidden, correct)
    rows, width = hidden.shape
    run = _C.linear_softmax_by_verdict if by_verdict(hidden.dtype) else _C.linear_softmax
    run(
        type=TYPES[hidden.dtype], rows=rows, vocab=weight.shape[0], width=width, hidden=hidden,
        hidden_stride=hidden.stride(0), weight=weight, weight_stride=weight.stride(0), bias=bias, correct=correct,
        wrong=wrong, exclude_answers=exclude_answers, scale=logit_scale, bytes=min(chunk_bytes, MOST_BYTES),
        log_sum=log_sum, mean=mean, mean_bias=mean_bias, answers=answers, threads=torch.get_num_threads(),
    )  # fmt: skip
    return log_sum, mean, mean_bias, answers
