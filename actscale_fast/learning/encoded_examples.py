"""Examples as checked token ids on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..architectures.hugging_face import unwrap
from ..architectures.layout import layout
from ..architectures.sharding import ModelProcesses, model_processes
from ..frozen.batching import Batch, left_padded, padding_known
from ..frozen.encoder import TextEncoder
from ..tasks.examples import prompt_of
from ..tasks.loading import ExampleSource, examples_from
from .answer_tokens import AnswerEncoder
from .long_answers import LongAnswers
from .prompt_spaces import warn_of_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Number of examples on which a fit measures the scales that its defaults are shares of.
_N_MEASURED = 64


class EncodedExamples:
    """Examples as token ids on one device, checked once so that no step has to.

    Args:
        examples, tokenizer, model: as for `fit`.
        paths: `Location.paths` of an intervention, for a model of an unlisted family.

    Raises:
        TypeError: not a Hugging Face model or tokenizer, or rows that are not examples.
        ValueError: no examples, an answer without tokens or with an unknown one, an answer that begins with the other
            one, or a prompt that is empty, longer than the model's context (with its answers) or has unknown tokens;
            the message names the row.

    Prompts that end with a space, and answers that begin with one after a chat template's line break, are a warning.
    """

    model: nn.Module | None = None  # the Hugging Face model inside wrappers
    #: Whether batches hold only prompts of one length, even if the model handles padding.
    alike_only: bool = False
    #: The answers of the examples that have an answer of several tokens, by row.
    long_answers: Mapping[int, LongAnswers] = MappingProxyType({})

    def __init__(
        self,
        examples: ExampleSource,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        paths: dict[str, str] | None = None,
    ) -> None:
        found = layout(model, paths)
        self.model = unwrap(model)
        encoder = TextEncoder(found, tokenizer)
        self.examples = examples_from(examples)
        self.device, self.pad_id = encoder.device, encoder.pad_id
        answers = AnswerEncoder(encoder, model.config.get_text_config().vocab_size)
        self.prompts: list[list[int]] = []
        both: list[tuple[list[int], list[int]]] = []
        for example in self.examples:
            self.prompts.append(encoder.prompt(prompt_of(example), str(example.where)))
            both.append(answers.encode(example, self.prompts[-1]))
        warn_of_spaces(self.examples, tokenizer)
        answers.warn_of_missing_spaces()
        self.correct = torch.tensor([correct[0] for correct, _ in both], device=self.device)  # [N], the first tokens
        self.wrong = torch.tensor([wrong[0] for _, wrong in both], device=self.device)  # [N]
        self.long_answers = {
            row: LongAnswers(tuple(correct), tuple(wrong))
            for row, (correct, wrong) in enumerate(both)
            if len(correct) > 1 or len(wrong) > 1
        }
        if self.long_answers:  # they share batches, whose columns must all have a place in the context
            most = max(len(self.prompts[row]) for row in self.long_answers)
            most += max(one.longest for one in self.long_answers.values()) - 1
            encoder.check_length(most, "examples: the longest prompt with the longest answer of several tokens")

        self._refuse_differences(model_processes(self.model))

    def _refuse_differences(self, together: ModelProcesses) -> None:
        """ValueError where processes that must run the same passes have other examples, and would wait for ever."""
        if together.size == 1:
            return
        tokens = (self.prompts, self.correct.tolist(), self.wrong.tolist(), self.long_answers)
        if len(set(together.all_gather(hashlib.sha256(repr(tokens).encode()).hexdigest()))) > 1:
            raise ValueError(
                f"examples: the {together.size} processes that hold the model have different examples, expected the "
                "same in each: a call shares its work by itself"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, batch_size: int, rows: Sequence[int] | None = None) -> list[list[int]]:
        """These rows (None: all) in batches of similar length, so that there is little padding."""
        order = sorted(range(len(self)) if rows is None else rows, key=lambda row: len(self.prompts[row]))
        batches: list[list[int]] = []
        for row in order:
            alike = self.pads or (batches and len(self.prompts[batches[-1][0]]) == len(self.prompts[row]))
            if batches and alike and len(batches[-1]) < batch_size:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may share a batch, because padding does not change their results."""
        return not self.alike_only and (self.model is None or padding_known(self.model) is not False)

    def kind(self, row: int) -> int | None:
        """Examples of one kind may share a pass: None where both answers are one token, else a number."""
        if row not in self.long_answers:
            return None
        return 0 if self.pads else len(self.prompts[row])  # without padding, prompts before answers have one length

    def by_kind(self, rows: Sequence[int]) -> list[list[int]]:
        """These rows, apart by their kind."""
        kinds: dict[int | None, list[int]] = {}
        for row in rows:
            kinds.setdefault(self.kind(row), []).append(row)
        return list(kinds.values())

    def joined(self, row: int) -> list[int]:
        """The tokens that run for an example: its prompt's, and of answers of several tokens all but the last."""
        answers = self.long_answers.get(row)
        return self.prompts[row] if answers is None else answers.joined(self.prompts[row])

    def sequences(self, row: int) -> list[list[int]]:
        """The sequences of these tokens: the prompt, or the prompt with either answer."""
        answers = self.long_answers.get(row)
        return [self.prompts[row]] if answers is None else answers.sequences(self.prompts[row])

    def refuse_long_answers(self, what: str) -> None:
        """Raise a ValueError if an example has an answer of several tokens, which `what` cannot use."""
        if self.long_answers:
            where = self.examples[min(self.long_answers)].where
            raise ValueError(f"{where} has an answer of several tokens, but {what}")

    def batch(self, rows: Sequence[int], multiple: int = 1) -> Batch:
        """The prompts of these rows, padded on the left to the longest of them.

        Args:
            rows: the rows.
            multiple: pad to a multiple of this, but not beyond the longest prompt of all, so that few widths occur.
        """
        prompts = [self.prompts[row] for row in rows]
        length = max(map(len, prompts))
        if multiple > 1:
            length = min(-(-length // multiple) * multiple, max(map(len, self.prompts)))
        return left_padded(prompts, self.pad_id, self.device, length)


def evenly_spaced(rows: Sequence[int]) -> list[int]:
    """At most 64 of these rows, for what a fit measures before its first step."""
    n = min(len(rows), _N_MEASURED)
    return [rows[index * len(rows) // n] for index in range(n)]
