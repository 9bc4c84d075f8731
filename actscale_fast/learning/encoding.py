"""From examples to batches of tokens, and from batches to the next-token logits of each prompt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models import layout
from ..models.adapter import unwrap
from .examples import Example, check_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded prompts: the last column is every prompt's last token."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    padded: bool  # whether any row is shorter than T

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def repeat(self, times: int) -> Batch:
        """The rows `times` over: [B, T] becomes [times·B, T]."""
        return Batch(self.input_ids.repeat(times, 1), self.attention_mask.repeat(times, 1), self.padded)

    def take(self, rows: Tensor) -> Batch:
        """The rows of an index tensor, int64 [R]."""
        return Batch(self.input_ids[rows], self.attention_mask[rows], self.padded)


class EncodedExamples:
    """Examples as token ids on one device, checked once so that no step has to.

    Args:
        examples, tokenizer, model: as `fit` takes them.
        paths: `Location.paths` of an intervention on a model of an unlisted family.

    Raises:
        TypeError: a model that is not Hugging Face's, no tokenizer, rows that are no examples.
        ValueError: no examples, an answer that is not one known token, answers that are the same token, an empty
            prompt, one longer than the model's context or with tokens it does not have; each names the row.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        paths: dict[str, str] | None = None,
    ) -> None:
        found = layout(model, paths)
        if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
            raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected a Hugging Face tokenizer")
        self.examples = check_examples(examples)
        embedding: Tensor = found.model.get_input_embeddings().weight  # type: ignore[operator]
        self.device = embedding.device
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.pad_id = 0 if pad_id is None else pad_id  # masked out: any id serves
        context, width = found.max_context, model.config.get_text_config().vocab_size
        self.prompts: list[list[int]] = []
        correct: list[int] = []
        wrong: list[int] = []
        for row, example in enumerate(self.examples):
            ids = open_ids(tokenizer, example.prompt)
            if not ids:
                raise ValueError(f"examples: row {row}: the prompt {example.prompt!r} has no tokens")
            if context is not None and len(ids) > context:
                raise ValueError(f"examples: row {row} has {len(ids)} tokens, expected at most the model's {context}")
            if max(ids) >= embedding.shape[0]:
                raise ValueError(
                    f"examples: row {row}: the prompt has token id {max(ids)}, expected less than the model's "
                    f"{embedding.shape[0]}; is the tokenizer that of another model?"
                )
            self.prompts.append(ids)
            for name, kept in (("correct", correct), ("wrong", wrong)):
                token = _answer_token(tokenizer, example.prompt, ids, getattr(example, name), f"row {row}, {name}")
                if token >= width:
                    raise ValueError(f"examples: row {row}, {name}: token id {token}, expected less than {width}")
                kept.append(token)
            if correct[-1] == wrong[-1]:
                raise ValueError(
                    f"examples: row {row}: correct {example.correct!r} and wrong {example.wrong!r} are one token"
                )
        self.correct = torch.tensor(correct, device=self.device)  # [N]
        self.wrong = torch.tensor(wrong, device=self.device)  # [N]

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All rows in batches of similar length, so that little is padded."""
        order = sorted(range(len(self)), key=lambda row: len(self.prompts[row]))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def batch(self, rows: Sequence[int], multiple: int = 1) -> Batch:
        """The prompts of these rows, padded on the left to the longest of them.

        With a `multiple` to one of it, though to no more than the longest prompt of all: few widths occur.
        """
        prompts = [self.prompts[row] for row in rows]
        length = max(map(len, prompts))
        if multiple > 1:
            length = min(-(-length // multiple) * multiple, max(map(len, self.prompts)))
        ids = [[self.pad_id] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        padded = any(len(prompt) < length for prompt in prompts)
        return Batch(torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device), padded)


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's token ids with the special tokens that open it, without those that close it: the text goes on."""
    ids = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for end in range(len(ids), len(plain) - 1, -1):
        if ids[end - len(plain) : end] == plain:
            return ids[:end]
    return ids  # a tokenizer that splits a text without its special tokens in another way


def _answer_token(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], answer: str, where: str
) -> int:
    """The one token that `answer` adds to the prompt, as the tokenizer itself splits the two together."""
    joined = open_ids(tokenizer, prompt + answer)
    added = joined[len(prompt_ids) :]
    if joined[: len(prompt_ids)] != prompt_ids:  # tokens merge across the border
        added = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(added) != 1:
        tokens = tokenizer.convert_ids_to_tokens(added)
        hint = "" if answer[:1].isspace() else f"; did you mean {' ' + answer!r}, with its leading space?"
        raise ValueError(f"examples: {where}: {answer!r} is {len(added)} tokens {tokens}, expected one{hint}")
    if added[0] == tokenizer.unk_token_id and answer.strip() != tokenizer.unk_token:
        raise ValueError(f"examples: {where}: {answer!r} is no token of the tokenizer (it reads {tokenizer.unk_token})")
    return int(added[0])


def forward_arguments(model: PreTrainedModel, batch: Batch, width: int | None = None) -> dict[str, Any]:
    """What the model is called with, for the last token's logits alone where it allows that.

    Args:
        model: plain or wrapped.
        batch: the prompts, whole.
        width: the last columns that run; those before stand in a cache. None: all columns.
    """
    accepted = accepted_arguments(model)
    ids = batch.input_ids if width is None else batch.input_ids[:, -width:]
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if batch.padded:  # without padding the model's own causal path is exact, and faster without a mask
        arguments["attention_mask"] = batch.attention_mask
        if "position_ids" in accepted:
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp_(min=0)
            arguments["position_ids"] = positions if width is None else positions[:, -width:]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    return arguments


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of a model's forward pass; wrappers hand theirs on."""
    return _accepted(type(unwrap(model)))  # type: ignore[arg-type]


@functools.cache
def _accepted(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


def next_token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits [B, V] that follow each prompt; no other position goes through the head where the model allows it."""
    return model(**forward_arguments(model, batch)).logits[:, -1]
