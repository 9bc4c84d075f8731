"""From what was measured on each prompt to the figures of an `Evaluation`, with their bootstrap intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bootstrap import intervals


class Measured(NamedTuple):
    """What was measured on N prompts; each [N], in float64. "Correct" is under β = +1, "wrong" under β = −1."""

    start: Tensor  # z[c] − z[w] in the frozen model
    plus: Tensor  # z[c] − z[w] under β = +1
    minus: Tensor  # z[c] − z[w] under β = −1
    kl_correct: Tensor
    kl_wrong: Tensor
    kept_correct: Tensor  # 1 where the most likely other token is that of the frozen model
    kept_wrong: Tensor
    top_correct: Tensor  # as in `AnswerRanks`, for the correct answer
    top_wrong: Tensor  # the same for the wrong answer
    rank_correct: Tensor
    rank_wrong: Tensor
    log_probability_correct: Tensor
    log_probability_wrong: Tensor

    def frozen(self, ranks: Tensor) -> Measured:
        """The same for the frozen model, whose `top_correct` to `log_probability_wrong` are the columns of `ranks`."""
        none = torch.zeros_like(self.start)
        return Measured(self.start, self.start, self.start, none, none, none + 1, none + 1, *ranks.unbind(-1))

    def figures(self, *, baseline: bool = False) -> dict[str, Any]:
        """The fields of an `Evaluation` that depend on the prompts, by name.

        Args:
            baseline: whether these are the frozen model's, which flips nothing and keeps every token by definition.
        """
        plus, minus = (self.plus > 0).double(), (self.minus < 0).double()
        means = {
            "flip_to_correct": plus,
            "flip_to_wrong": minus,
            "logit_difference": self.plus,
            "logit_difference_inverted": self.minus,
            "top_correct": self.top_correct,
            "top_wrong": self.top_wrong,
            "probability_correct": self.log_probability_correct.exp(),
            "probability_wrong": self.log_probability_wrong.exp(),
        }
        medians = {"rank_correct": self.rank_correct, "rank_wrong": self.rank_wrong}
        changes = {
            "newly_correct": torch.where(self.start > 0, torch.nan, plus),
            "newly_wrong": torch.where(self.start < 0, torch.nan, minus),
            "kl": (self.kl_correct + self.kl_wrong) / 2,
            "kl_correct": self.kl_correct,
            "kl_wrong": self.kl_wrong,
            "top1": (self.kept_correct + self.kept_wrong) / 2,
        }
        found: dict[str, Any] = {name: float(values.mean()) for name, values in means.items()}
        found |= {name: float(values.median()) for name, values in medians.items()}
        found |= {name: _mean(values) for name, values in changes.items()}
        found["kl"] = float(torch.cat([self.kl_correct, self.kl_wrong]).mean())
        found["intervals"] = intervals(means if baseline else means | changes, medians)
        return found | ({"newly_correct": None, "newly_wrong": None} if baseline else {})


def _mean(values: Tensor) -> float | None:
    """The mean of the values that are not NaN; None: there is none."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None
