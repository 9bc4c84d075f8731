"""Left-padded batches of prompts, and the arguments that a model is called with on them."""

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
    """Left-padded prompts: the last column holds the last token of every prompt."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    padded: bool  # whether any row is shorter than T

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def repeat(self, times: int) -> Batch:
        """All rows, repeated `times` times: [B, T] becomes [times·B, T]."""
        return Batch(self.input_ids.repeat(times, 1), self.attention_mask.repeat(times, 1), self.padded)

    def take(self, rows: Tensor) -> Batch:
        """The rows with these numbers, int64 [R]."""
        return Batch(self.input_ids[rows], self.attention_mask[rows], self.padded)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, length: int | None = None
) -> Batch:
    """Prompts as one batch with `length` columns; None: as many as the longest prompt has tokens."""
    length = max(map(len, prompts)) if length is None else length
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    padded = any(len(prompt) < length for prompt in prompts)
    return Batch(torch.tensor(ids, device=device), torch.tensor(mask, device=device), padded)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of padding tokens. They are masked out, so any id serves where the tokenizer has none."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return int(found)


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that will be continued: with the special tokens that open it, without those that close it."""
    ids = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    opening = ids[: len(ids) - len(plain)] if ids[len(ids) - len(plain) :] == plain else []
    if opening and plain[: len(opening)] == opening:  # the text has them already, for example from a chat template
        return plain
    for end in range(len(ids), len(plain) - 1, -1):
        if ids[end - len(plain) : end] == plain:
            return ids[:end]
    return ids  # without special tokens, this tokenizer splits the text differently


def forward_arguments(
    model: PreTrainedModel, batch: Batch, width: int | None = None, n_last: int = 1
) -> dict[str, Any]:
    """The arguments for a forward pass on a batch; only the last tokens' logits are requested where possible.

    Args:
        model: plain or wrapped.
        batch: the whole prompts.
        width: the number of last columns that run; a cache holds those before. None: all columns.
        n_last: the number of last columns whose logits are requested.

    Raises:
        ValueError: the batch is padded, and padding was seen to change this model's results.
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
    if batch.padded:  # otherwise the model is exact, and faster, without a mask
        arguments["attention_mask"] = batch.attention_mask
        if "position_ids" in accepted:
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp_(min=0)
            arguments["position_ids"] = positions if width is None else positions[:, -width:]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = n_last
    return arguments


def note_padding(model: nn.Module, honoured: bool) -> None:
    """Remember whether a model gives the same results for prompts that are padded on the left."""
    _pads[model] = honoured


def padding_known(model: nn.Module) -> bool | None:
    """What `note_padding` was told about an unwrapped model; None: nothing."""
    return _pads.get(model)


def next_token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits [B, V] after each prompt; where the model allows it, its head runs on the last token only."""
    return model(**forward_arguments(model, batch)).logits[:, -1]
