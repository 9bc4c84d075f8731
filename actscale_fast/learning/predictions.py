"""What a model predicts after prompts: the next token, and how the two answers compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.lm_head import OutputHead
from ..frozen.batching import forward_arguments
from ..frozen.partial_forward import PartialForward
from ..patching.patch import AnyPatch
from .answer_batch import answer_batch
from .answer_ranks import AnswerRanks, answer_ranks, whole_ranks
from .answer_scores import log_probability_differences
from .encoded_examples import EncodedExamples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Tokens of answers whose logits are made at a time.
_TOKENS = 64


class Predictions:
    """Runs examples on an open, frozen model.

    Args:
        model: plain or compiled.
        data: the examples.
        head, section: from `open_frozen_model`.
    """

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, head: OutputHead | None, section: PartialForward
    ) -> None:
        self.model, self.data, self.head, self.section = model, data, head, section

    def run(self, rows: Sequence[int], patched: AnyPatch | None) -> tuple[Tensor, Tensor, AnswerRanks | None]:
        """(the logits after each prompt [B, V], log p(correct) − log p(wrong) [B], the ranks of whole answers [2·B]).

        The ranks are those of all correct answers, then of all wrong ones; None where both are one token, whose ranks
        follow from the logits.

        Args:
            rows: numbers of examples of one kind (see `EncodedExamples.kind`), which may be repeated.
            patched: the patch that is on the model; needed for answers of several tokens, whose rows are twice as many:
                first those with correct answers, then those with wrong ones.
        """
        if rows[0] not in self.data.long_answers:
            output = self.section.run(forward_arguments(self.model, self.data.batch(rows)))[0]
            logits = self._logits(output)
            answers = (ids[list(rows)] for ids in (self.data.correct, self.data.wrong))
            return logits, logit_difference(logits, *answers), None
        assert patched is not None
        made = answer_batch(self.data, rows)
        with made.announced(patched):
            output = self.section.run(made.arguments(self.model), every_token=True)[0][:, -made.n_last :]
        differences = log_probability_differences(output, made.tokens, len(rows), self.head)
        return self._logits(output[: len(rows), 0]), differences, self._whole_ranks(output, rows)

    def _whole_ranks(self, output: Tensor, rows: Sequence[int]) -> AnswerRanks:
        """The ranks of answers of several tokens; row b of the output [2·B, T, ·] predicts the tokens of answer b."""
        both = [self.data.long_answers[row] for row in rows]
        answers = [one.correct for one in both] + [one.wrong for one in both]
        tokens = [(row, t, token) for row, answer in enumerate(answers) for t, token in enumerate(answer)]
        of, column, ids = torch.tensor(tokens, dtype=torch.int64, device=output.device).unbind(1)
        parts = [
            answer_ranks(self._logits(output[of[some], column[some]]), ids[some])
            for some in torch.arange(len(tokens), device=output.device).split(_TOKENS)
        ]
        return whole_ranks(AnswerRanks(*map(torch.cat, zip(*parts, strict=True))), of, column == 0)

    def _logits(self, output: Tensor) -> Tensor:
        return output if self.head is None else self.head.logits(output)


def logit_difference(logits: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    """z[c] − z[w] in fp32 [B]."""
    columns = torch.stack([correct, wrong], -1).to(logits.device)
    difference: Tensor = logits.gather(-1, columns).to(torch.float32).diff(dim=-1)
    return -difference.squeeze(-1)
