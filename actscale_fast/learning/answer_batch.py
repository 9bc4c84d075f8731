"""Prompts with their answers of several tokens as one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..frozen.batching import Batch, forward_arguments, left_padded
from ..patching.patch import AnyPatch
from .encoded_examples import EncodedExamples
from .long_answers import ScoredTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """n prompts with their answers, in 2·n rows: row i holds the correct answer of prompt i, row n + i the wrong one.

    The prompts are padded on the left, so that they end in the same column, and the answers on the right, where no
    other token attends to the padding.
    """

    batch: Batch  # `padded` refers to the prompts
    n_prompt: int  # columns of the prompts
    n_last: int  # the last columns, from the prompts' last token on, whose predictions count
    tokens: dict[str, Tensor]  # of `ScoredTokens`; column 0 is the prompt's last token

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """The arguments for a forward pass."""
        return forward_arguments(model, self.batch, n_last=self.n_last)

    @contextlib.contextmanager
    def announced(self, patched: AnyPatch) -> Iterator[None]:
        """Tell a patch where the prompts end: tokens of the answers are steered as generated tokens are."""
        mask = self.batch.attention_mask[:, : self.n_prompt] if self.batch.padded else None
        with patched.prompt(self.n_prompt, mask):
            yield


def answer_batch(
    data: EncodedExamples, rows: Sequence[int], n_prompt: int | None = None, n_last: int | None = None
) -> AnswerBatch:
    """The batch of these examples, whose answers have several tokens.

    Args:
        data: the examples.
        rows: numbers of examples, which may be repeated.
        n_prompt, n_last: pad to as many columns; None: as many as these examples need.
    """
    answers = [data.long_answers[row] for row in rows]
    n_last = max(one.longest for one in answers) if n_last is None else n_last
    prompts = left_padded([data.prompts[row] for row in rows], data.pad_id, data.device, n_prompt)
    ends = [list(one.correct[:-1]) for one in answers] + [list(one.wrong[:-1]) for one in answers]
    padded = [[*end, *[data.pad_id] * (n_last - 1 - len(end))] for end in ends]
    added = torch.tensor(padded, dtype=torch.int64, device=data.device).view(len(ends), n_last - 1)
    both = prompts.repeat(2)
    mask = torch.cat([both.attention_mask, torch.ones_like(added)], 1)
    tokens = ScoredTokens()
    for index, one in enumerate(answers):
        tokens.add(index, one, lambda number, t, index=index: (index + number * len(rows), t))  # type: ignore[misc]
    batch = Batch(torch.cat([both.input_ids, added], 1), mask, both.padded)
    return AnswerBatch(batch, prompts.input_ids.shape[1], n_last, tokens.tensors())
