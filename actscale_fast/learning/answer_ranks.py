"""Where an answer stands among all next tokens: whether it is the top one, its rank and its probability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Logits that are compared at a time; the comparisons and exponentials need some copies of them.
_AT_ONCE = 1 << 22


class AnswerRanks(NamedTuple):
    """How the model ranks one answer token per row; each [R], in float64."""

    top: Tensor  # 1 where the answer is the most likely token, which greedy decoding takes
    rank: Tensor  # 1 for the most likely token
    log_probability: Tensor  # in nats, over the whole vocabulary


def answer_ranks(logits: Tensor, answers: Tensor) -> AnswerRanks:
    """How the model ranks the answers among all next tokens.

    Args:
        logits: of the next token, [R, V], in any floating dtype.
        answers: token ids, int64 [R].

    Among equal logits the token with the smaller id comes first, as in `argmax`, so that rank 1 is the token that
    greedy decoding takes.
    """
    places = torch.arange(logits.shape[-1], device=logits.device)
    ranks, log_probabilities = [], []
    for z, answer in zip(*(t.split(max(_AT_ONCE // logits.shape[-1], 1)) for t in (logits, answers)), strict=True):
        own = z.gather(-1, answer[:, None])
        before = (z > own) | ((z == own) & (places < answer[:, None]))
        ranks.append(1 + before.sum(-1))
        # Halves are widened: their sum of 50,000 exponentials would be off by per cents.
        wide = z if z.dtype == torch.float64 else z.float()
        log_probabilities.append(own.squeeze(-1).double() - wide.logsumexp(-1).double())
    rank = torch.cat(ranks)
    return AnswerRanks((rank == 1).double(), rank.double(), torch.cat(log_probabilities))
