"""The softmax over a vocabulary from hidden states in C++ (csrc/linear_softmax.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..addresses import TYPES, address

#: Scratch beyond this is not taken, whatever the caller allows: W is read again for every 64 rows anyway.
MOST_BYTES = 64 << 20


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
    n_rows, width = hidden.shape
    log_sum = hidden.new_empty(n_rows, dtype=torch.float64)
    mean_bias = torch.empty_like(log_sum)
    mean = hidden.new_empty((n_rows, width), dtype=torch.float32)
    answers = hidden.new_empty((n_rows if correct is not None else 0, 2), dtype=torch.float32)
    _C.linear_softmax(
        TYPES[hidden.dtype], n_rows, weight.shape[0], width, hidden.data_ptr(), hidden.stride(0), weight.data_ptr(),
        weight.stride(0), address(bias), address(correct), address(wrong), exclude_answers, logit_scale,
        min(chunk_bytes, MOST_BYTES), log_sum.data_ptr(), mean.data_ptr(), mean_bias.data_ptr(),
        answers.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return log_sum, mean, mean_bias, answers
