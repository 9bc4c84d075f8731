"""Answers of several tokens, and the tokens that their comparison consists of.

    D = log p(c) − log p(w),  log p(a) = Σ_t log softmax(z_t)[a_t]

where z_t are the logits after the prompt and the answer's first t tokens. Tokens that both answers begin with cancel.
The first tokens that differ, number k, follow the same text, so that their normaliser cancels too:

    D = z_k[c_k] − z_k[w_k] + Σ_{t>k} log softmax(z_t)[c_t] − Σ_{t>k} log softmax(z_t)[w_t]

With one token each this is the logit difference z[c] − z[w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LongAnswers:
    """The tokens of two answers, at least one of which has several; neither begins with the other."""

    correct: tuple[int, ...]
    wrong: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Number of tokens that both answers begin with."""
        pairs = enumerate(zip(self.correct, self.wrong, strict=False))
        return next(number for number, (a, b) in pairs if a != b)

    @property
    def longest(self) -> int:
        """Number of tokens of the longer answer."""
        return max(len(self.correct), len(self.wrong))

    def sequences(self, prompt: Sequence[int]) -> list[list[int]]:
        """What has to run: the prompt with each answer, except for its last token, which is only predicted."""
        return [[*prompt, *answer[:-1]] for answer in (self.correct, self.wrong)]

    def joined(self, prompt: Sequence[int]) -> list[int]:
        """All tokens of the two sequences, with a common beginning once."""
        return [*prompt, *self.correct[:-1], *self.wrong[self.shared : -1]]


class ScoredTokens:
    """The answers' tokens in the difference D of some losses, and where in the model's output each is predicted."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.ids: list[int] = []
        self.losses: list[int] = []
        self.signs: list[float] = []
        self.later: list[int] = []  # those whose normaliser does not cancel

    def add(self, loss: int, answers: LongAnswers, place: Callable[[int, int], tuple[int, int]]) -> None:
        """Add the tokens of one loss.

        Args:
            loss: its number.
            answers: its answers.
            place: from 0 (the correct answer) or 1 (the wrong one) and the number of a token, the row and the column of
                the output that predicts that token.
        """
        for number, (answer, sign) in enumerate(((answers.correct, 1.0), (answers.wrong, -1.0))):
            for t in range(answers.shared, len(answer)):
                parts_here = t == answers.shared  # both answers are then read at the same place
                row, column = place(0 if parts_here else number, t)
                if not parts_here:
                    self.later.append(len(self.ids))
                self.rows.append(row)
                self.columns.append(column)
                self.ids.append(answer[t])
                self.losses.append(loss)
                self.signs.append(sign)

    def tensors(self) -> dict[str, Tensor]:
        """On the CPU: "row", "column", "id", "loss" int64 [K], "sign" fp32 [K], "later" int64 [fewer], into the K."""
        found = {"row": self.rows, "column": self.columns, "id": self.ids, "loss": self.losses, "later": self.later}
        tensors = {name: torch.tensor(values, dtype=torch.int64, device="cpu") for name, values in found.items()}
        return tensors | {"sign": torch.tensor(self.signs, dtype=torch.float32, device="cpu")}
