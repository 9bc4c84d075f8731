"""The passes of an attribution: a gradient at α = 0, and each head removed (or scaled) once, starting at its layer.

The prompts run in pieces that fit the memory. One forward pass of the frozen model over a piece, with scalars of 0,
gives the logit differences, their gradient and the hidden states that enter each chosen layer. The knock-outs of a
layer start from these: a batch has prompts × (slots · heads) rows, each with one group of a stack of one-hot α = −1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from ...architectures.hugging_face import embedding_weight
from ...architectures.layout import layout
from ...frozen.batching import Batch, forward_arguments
from ...frozen.shortcuts import open_frozen_model
from ...interventions import ActivScalar
from ...patching.patch import Patch
from ..answer_batch import AnswerBatch, answer_batch
from ..answer_scores import answer_log_probabilities, chosen_logits, log_probability_differences
from ..encoded_examples import EncodedExamples
from ..engine import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, even_size, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens in one pass on a GPU, because all heads times all prompts may not fit (not measured).
_PASS_TOKENS_GPU = 1 << 14


@dataclass(frozen=True, slots=True)
class Found:
    """Means over all examples."""

    difference: float  # the frozen model's measure: log p(correct) − log p(wrong), for one token each z[c] − z[w]
    gradient: Tensor | None  # [L, P, H]
    changes: Tensor | None  # fp32 [L, P, H] on the CPU


class KnockOut:
    """Runs the passes; a context manager that opens a model that is already frozen.

    Args:
        model: a causal language model; the one inside a wrapper runs.
        data: the encoded examples.
        scalars: scalars that are all 0.
        batch_size: the largest number of prompts in a piece.
        cache_bytes: memory for the hidden states of a piece; a single prompt may exceed it.
        alpha: what a head's scalar is set to; −1 removes the head.
        measure: what is measured, and what the gradient is of: "difference", or "probability", that of the correct
            answer.
    """

    def __init__(
        self, model: PreTrainedModel, data: EncodedExamples, scalars: ActivScalar, batch_size: int, cache_bytes: int,
        *, alpha: float = -1.0, measure: Literal["difference", "probability"] = "difference",
    ) -> None:  # fmt: skip
        self.alpha, self.measure = alpha, measure
        self.data, self.scalars = data, scalars
        self.batch_size, self.cache_bytes = batch_size, cache_bytes
        self.location = scalars.location
        self.found = layout(model, self.location.paths)
        self.on_cpu = data.device.type == "cpu"
        self.max_tokens = PASS_TOKENS_CPU if self.on_cpu else _PASS_TOKENS_GPU
        self.starts = [self.location.first_changed(layer) for layer in self.location.layers]
        #: Slots times heads, without the slot of generated tokens if no example has such tokens.
        unused = self.location.generated and not data.long_answers
        self.n_groups = (self.location.n_slots - unused) * self.location.n_heads
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        arguments = forward_arguments(self._model, self.data.batch([0]))
        self.head, self.section = self._open.enter_context(open_frozen_model(self.found, self._model, arguments))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def _model(self) -> Any:
        return self.found.model

    def run(self, *, gradient: bool, knock_out: bool, progress: bool) -> Found:
        """Run all pieces one after the other."""
        from tqdm.auto import tqdm

        n_layers, n_slots, n_heads = self.scalars.alpha.shape
        total = torch.zeros_like(self.scalars.alpha)
        difference, changes = 0.0, torch.zeros(n_layers, n_slots, n_heads, dtype=torch.float64, device="cpu")
        of_prompts = changes[:, : self.n_groups // n_heads]
        pieces = self._pieces(knock_out)
        steps = len(pieces) * (1 + (n_layers if knock_out else 0))
        with tqdm(total=steps, desc="attribution", disable=not progress, dynamic_ncols=True) as bar:
            for rows in pieces:
                long = rows[0] in self.data.long_answers
                batch = answer_batch(self.data, rows) if long else self.data.batch(rows)
                before, added, hidden = self._frozen(rows, batch, gradient, knock_out)
                difference += float(before.cpu().double().sum())
                if added is not None:
                    total += added
                bar.update()
                if knock_out:
                    after = []
                    for index in range(n_layers):
                        after.append(self._removed(index, rows, batch, hidden))
                        bar.update()
                    change = (torch.stack(after) - before[:, None]).cpu().double().sum(1)  # [L, n_groups]
                    of_prompts += change.unflatten(1, (-1, n_heads))
        n = len(self.data)
        return Found(
            difference / n,
            total / n if gradient else None,
            (changes / n).float() if knock_out else None,
        )

    def _pieces(self, knock_out: bool) -> list[list[int]]:
        """The examples in pieces of similar length, each within the bounds."""
        lengths = [max(map(len, self.data.sequences(row))) for row in range(len(self.data))]
        pieces = []
        for alike in self.data.by_kind(range(len(self.data))):
            n_rows = len(self.data.sequences(alike[0]))
            # Each prompt runs once per group, so a column of padding costs that much.
            weight, cost = n_rows * (self.n_groups if knock_out else 1), PASS_COST_CPU if self.on_cpu else PASS_COST_GPU
            cost = cost if self.data.pads else 0  # without padding each length needs passes of its own
            for items in plan([lengths[row] for row in alike], weight=weight, pass_cost=cost, max_tokens=None):
                rows = [alike[item] for item in items]
                longest = n_rows * max(lengths[row] for row in rows)
                most = min(self.batch_size, self.max_tokens // longest)
                if knock_out:
                    kept = len({start for start in self.starts if start}) * longest * self._token_bytes()
                    most = min(most, self.cache_bytes // max(kept, 1))
                size = even_size(len(rows), most)
                pieces += [rows[first : first + size] for first in range(0, len(rows), size)]
        return pieces

    def _token_bytes(self) -> int:
        """Bytes of one hidden state."""
        weight = embedding_weight(self._model)
        return int(self.found.hidden_size * weight.element_size())

    def _frozen(
        self, rows: Sequence[int], batch: Batch | AnswerBatch, gradient: bool, knock_out: bool
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """The frozen model's measure [B], the gradient of its sum, and hidden states by the layer they enter."""
        wanted = sorted({start for start in self.starts if start}) if knock_out else []
        with torch.set_grad_enabled(gradient), Patch(self._model, self.scalars) as patched:
            output, noted = self._pass(patched, batch, wanted=wanted)
            difference = self._difference(output, rows, batch)
            added = torch.autograd.grad(difference.sum(), self.scalars.alpha)[0] if gradient else None
        return difference.detach(), added, {start: hidden.detach() for start, hidden in noted.items()}

    @torch.no_grad()
    def _removed(
        self, index: int, rows: Sequence[int], batch: Batch | AnswerBatch, hidden: dict[int, Tensor]
    ) -> Tensor:
        """The measure [B, n_groups] with one (slot, head) of the index-th chosen layer removed per group."""
        n_items = len(rows) * self.n_groups
        inner = batch.batch if isinstance(batch, AnswerBatch) else batch
        size = even_size(n_items, self.max_tokens // (inner.input_ids.shape[1] * (len(inner) // len(rows))))
        start = self.starts[index]
        differences = []
        with Patch(self._model, self._one_hot(index), group=torch.zeros(0, dtype=torch.int64, device="cpu")) as patched:
            for items in torch.arange(n_items, device="cpu").split(size):
                place, group = items // self.n_groups, items % self.n_groups
                examples = [rows[row] for row in place.tolist()]
                part: Batch | AnswerBatch
                if isinstance(batch, AnswerBatch):
                    part = answer_batch(self.data, examples, batch.n_prompt, batch.n_last)
                    place, group = torch.cat([place, len(rows) + place]), group.repeat(2)  # one row per answer
                else:
                    part = batch.take(place.to(batch.input_ids.device))
                patched.group = group
                states = hidden[start][place.to(hidden[start].device)] if start else None
                output, _ = self._pass(patched, part, first=start, hidden=states)
                differences.append(self._difference(output, examples, part))
        return torch.cat(differences).view(len(rows), self.n_groups)

    def _pass(self, patched: Patch, batch: Batch | AnswerBatch, **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """One run of the section, where all columns belong to the prompt or to an answer after it."""
        if isinstance(batch, AnswerBatch):
            with batch.announced(patched):
                output, noted = self.section.run(batch.arguments(self._model), every_token=True, **options)
            return output[:, -batch.n_last :], noted
        with patched.prompt(batch.input_ids.shape[1], batch.attention_mask if batch.padded else None):
            return self.section.run(forward_arguments(self._model, batch), **options)

    def _one_hot(self, index: int) -> ActivScalar:
        """A stack for the index-th chosen layer, whose g-th group removes (or scales) the g-th (slot, head)."""
        location = replace(self.location, layers=(self.location.layers[index],))
        stack = ActivScalar(location, n_groups=self.n_groups, device=self.scalars.device).requires_grad_(False)
        stack.alpha.view(self.n_groups, -1).fill_diagonal_(self.alpha)
        return stack

    def _difference(self, output: Tensor, rows: Sequence[int], batch: Batch | AnswerBatch) -> Tensor:
        """The measure [B] in fp32 or wider: log p(correct) − log p(wrong), for one token each z[c] − z[w]; or p."""
        if self.measure == "probability":
            return answer_log_probabilities(output, self.data, rows, self.head)[:, 0].exp()
        if isinstance(batch, AnswerBatch):
            return log_probability_differences(output, batch.tokens, len(rows), self.head)
        correct, wrong = self.data.correct[list(rows)], self.data.wrong[list(rows)]
        pair = chosen_logits(output, torch.stack([correct, wrong], -1), self.head)  # [B, 2]
        return pair[:, 0] - pair[:, 1]
