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


def whole_ranks(tokens: AnswerRanks, answer: Tensor, is_first: Tensor) -> AnswerRanks:
    """How the model ranks answers of several tokens, from the ranks of their tokens, each after those before it.

    An answer is on top where all of its tokens are, so that greedy generation begins with the whole answer; its rank is
    that of its first token, and its probability the product of theirs.

    Args:
        tokens: of K tokens, ordered by answer.
        answer: the answer that each token belongs to, int64 [K]: 0, …, R − 1.
        is_first: whether it is the first one, bool [K].
    """
    n = int(is_first.sum())
    empty = tokens.rank.new_zeros(n)
    top = (empty + 1).scatter_reduce(0, answer, tokens.top, "amin")
    return AnswerRanks(top, tokens.rank[is_first], empty.index_add(0, answer, tokens.log_probability))
