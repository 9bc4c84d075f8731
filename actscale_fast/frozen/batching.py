"""Calling a model on prompts: token ids that a text opens with, left-padded batches, the last token's logits alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures.arguments import accepted_arguments
from ..architectures.hugging_face import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_pads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


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


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, length: int | None = None
) -> Batch:
    """Prompts as one batch, `length` columns wide or as wide as the longest of them."""
    length = max(map(len, prompts)) if length is None else length
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    padded = any(len(prompt) < length for prompt in prompts)
    return Batch(torch.tensor(ids, device=device), torch.tensor(mask, device=device), padded)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that padding gets; it is masked out, so that any serves where the tokenizer has none."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return int(found)


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's token ids with the special tokens that open it, without those that close it: the text goes on."""
    ids = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    opening = ids[: len(ids) - len(plain)] if ids[len(ids) - len(plain) :] == plain else []
    if opening and plain[: len(opening)] == opening:  # the text has them already, as one from a chat template
        return plain
    for end in range(len(ids), len(plain) - 1, -1):
        if ids[end - len(plain) : end] == plain:
            return ids[:end]
    return ids  # a tokenizer that splits a text without its special tokens in another way


def forward_arguments(model: PreTrainedModel, batch: Batch, width: int | None = None) -> dict[str, Any]:
    """What the model is called with, for the last token's logits alone where it allows that.

    Args:
        model: plain or wrapped.
        batch: the prompts, whole.
        width: the last columns that run; those before stand in a cache. None: all columns.
    """
    accepted = accepted_arguments(model)
    if batch.padded and padding_known(unwrap(model)) is False:
        raise ValueError(
            f"{type(unwrap(model)).__name__} does not leave a prompt as it is when it is padded on the left; give "
            "prompts of one length together (batch_size=1)"
        )
    ids = batch.input_ids if width is None else batch.input_ids[:, -width:]
    arguments: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if batch.padded:  # without padding the model's own causal path is exact, and faster without a mask
        arguments["attention_mask"] = batch.attention_mask
        if "position_ids" in accepted:
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp_(min=0)
            arguments["position_ids"] = positions if width is None else positions[:, -width:]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    return arguments


def note_padding(model: nn.Module, honoured: bool) -> None:
    """Remember whether padding on the left leaves a model's prompts as they are."""
    _pads[model] = honoured


def padding_known(model: nn.Module) -> bool | None:
    """What was noted of a model, not wrapped; None: nothing."""
    return _pads.get(model)


def next_token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits [B, V] that follow each prompt; no other position goes through the head where the model allows it."""
    return model(**forward_arguments(model, batch)).logits[:, -1]
