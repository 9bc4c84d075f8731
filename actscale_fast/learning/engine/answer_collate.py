"""A microbatch of prompts that run with their answers, because these have several tokens, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ... import ops
from ..answer_batch import answer_batch
from ..long_answers import ScoredTokens
from ..objective import LossOptions
from .collate import Collator, Loss, floats, ints, loss_weights
from .forward_backward import MicrobatchInputs, MicrobatchShape
from .microbatches import FitRequest, PackedRow


class AnswerCollator(Collator):
    """A `Collator` for examples of which some have answers of several tokens.

    Such a prompt runs from the first layer on, once per answer or as a tree with both answers as branches.
    """

    def collate(
        self, rows: Sequence[PackedRow], requests: Sequence[FitRequest], shared_below: int = 0
    ) -> MicrobatchInputs:
        """As `Collator.collate`; the rows are all of one kind."""
        if rows[0].prompts[0].row not in self.data.long_answers:
            return super().collate(rows, requests, shared_below)
        self.cache.begin(prompt.row for row in rows for prompt in row.prompts)
        if rows[0].tree is not None:
            width, n_last, padded = max(row.width for row in rows), 1, False
            tensors = self.packed_tokens(rows)
        else:
            made = answer_batch(self.data, [row.prompts[0].row for row in rows])
            width, n_last, padded = made.batch.input_ids.shape[1], made.n_last, made.batch.padded
            tensors = {"ids": made.batch.input_ids, "mask": made.batch.attention_mask}
        small, losses = self._rows_and_losses(rows, requests)
        kinds: dict[LossOptions, list[int]] = {}
        for place, loss in enumerate(losses):
            kinds.setdefault(requests[loss.prompt.request].objective.loss_options, []).append(place)
        references: list[ops.ReferenceStatistics | Tensor] = []
        for number, places in enumerate(kinds.values()):
            examples = ints([losses[place].prompt.row for place in places])
            small |= {f"{name}.{number}": ids[examples] for name, ids in self.answers.items()}
            if len(kinds) > 1:
                small[f"places.{number}"] = ints(places)
            references.append(self.cache.frozen_output(examples))
        tensors |= {name: value.to(self.data.device, non_blocking=True) for name, value in small.items()}
        shape = MicrobatchShape(
            width, padded, rows[0].tree is not None, 0, False, shared_below, tuple(kinds), answered=True, n_last=n_last
        )
        return MicrobatchInputs(shape, tensors, tuple(references))

    def _rows_and_losses(
        self, rows: Sequence[PackedRow], requests: Sequence[FitRequest]
    ) -> tuple[dict[str, Tensor], list[Loss]]:
        """The tensors that say which rows run and where each answer's tokens are predicted, and the losses."""
        n_rows = rows[0].n_rows
        owners = [*range(len(rows))] * n_rows  # first all rows with correct answers, then those with wrong ones
        directions = [row.directions(requests) for row in rows]
        batch_rows = [
            (number, here)
            for number in range(max(map(len, directions)))
            for here, index in enumerate(owners)
            if number < len(directions[index])
        ]
        where = {one: batch_row for batch_row, one in enumerate(batch_rows)}
        losses: list[Loss] = []
        tokens = ScoredTokens()
        for number, index in batch_rows:
            if index >= len(rows):
                continue
            row = rows[index]
            for place, prompt in enumerate(row.prompts):
                if row.tree is not None:
                    paths = row.tree.paths[2 * place : 2 * place + 2]
                    predicted = _on_paths(where[number, index], paths, len(self.data.prompts[prompt.row]))
                else:
                    predicted = _in_rows([where[number, index], where[number, index + len(rows)]])
                batch_row, column = predicted(0, 0)
                tokens.add(len(losses), self.data.long_answers[prompt.row], predicted)
                losses.append(Loss(batch_row, prompt, column))
        small = {
            "expand": ints([here for _, here in batch_rows]),
            "sign": floats([float(directions[owners[here]][number]) for number, here in batch_rows]),
            "row_of": ints([loss.batch_row for loss in losses]),
            "column_of": ints([loss.column for loss in losses]),
            **{f"answer.{name}": value for name, value in tokens.tensors().items()},
            **loss_weights(losses, requests),
        }
        if self.grouped:
            small["groups"] = ints([requests[rows[index].prompts[0].request].group for index in owners])
        return small, losses


def _on_paths(batch_row: int, paths: Sequence[Sequence[int]], length: int) -> Callable[[int, int], tuple[int, int]]:
    """Where token t of an answer is predicted, if both answers are paths of one row, after a prompt of this length."""
    return lambda answer, t: (batch_row, paths[answer][length - 1 + t])


def _in_rows(batch_rows: Sequence[int]) -> Callable[[int, int], tuple[int, int]]:
    """Where token t of an answer is predicted, if each answer has a row, whose first column ends the prompt."""
    return lambda answer, t: (batch_rows[answer], t)
