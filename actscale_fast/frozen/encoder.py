"""Texts as token ids that are checked for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..architectures.hugging_face import embedding_weight, input_device
from ..architectures.layout import ModelLayout
from .batching import Batch, left_padded, open_ids, pad_id_of
from .chat import chat_text, checked_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoder:
    """Turns texts into checked token ids for one model.

    A prompt is a text, or a list of chat messages, which the tokenizer's chat template writes as text. In every method
    `name` is what an error message calls it, such as "row 3 of prompts".

    Args:
        found: the model's layout.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        TypeError: the tokenizer is not one.
    """

    def __init__(self, found: ModelLayout, tokenizer: PreTrainedTokenizerBase) -> None:
        if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
            raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected a Hugging Face tokenizer")
        embedding: Tensor = embedding_weight(found.model)
        self.tokenizer = tokenizer
        self.device = input_device(found.model)
        self.n_tokens, self.context = embedding.shape[0], found.max_context
        self.pad_id = pad_id_of(tokenizer)

    def opened(self, prompt: object, name: str, then: str = "") -> list[int]:
        """The ids of a prompt that will be continued, after the special tokens that open it; possibly none.

        A chat template writes its special tokens itself, so the tokenizer adds none to messages.

        Args:
            prompt: a text, or chat messages.
            name: see above.
            then: is split together with the prompt, which it continues.
        """
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
            text = chat_text(self.tokenizer, checked_messages(prompt, name), name)
            return self.plain(text + then, name)
        return self.known(open_ids(self.tokenizer, self._string(prompt, name) + then), name)

    def plain(self, text: object, name: str) -> list[int]:
        """The ids of a text without special tokens; possibly none."""
        return self.known(list(self.tokenizer(self._string(text, name), add_special_tokens=False)["input_ids"]), name)

    def prompt(self, prompt: object, name: str) -> list[int]:
        """As `opened`, with at least one token and no more than the model's context."""
        ids = self.opened(prompt, name)
        if not ids:
            raise ValueError(f"{name}: {prompt!r} has no tokens")
        self.check_length(len(ids), name)
        return ids

    def prompts(self, texts: Sequence[str], name: str) -> list[list[int]]:
        """The ids of each prompt in a list that is not empty."""
        return [self.prompt(text, f"row {row} of {name}") for row, text in enumerate(check_texts(texts, name), 1)]

    def check_length(self, n_tokens: int, name: str) -> None:
        """Raise a ValueError if there are more tokens than the model's context holds."""
        if self.context is not None and n_tokens > self.context:
            raise ValueError(f"{name} has {n_tokens} tokens, expected at most the model's {self.context}")

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of ids, padded on the left, on the model's device."""
        return left_padded(rows, self.pad_id, self.device)

    def known(self, ids: list[int], name: str) -> list[int]:
        """The ids, each of which the model must have."""
        if ids and max(ids) >= self.n_tokens:
            raise ValueError(
                f"{name} has token id {max(ids)}, expected less than the model's {self.n_tokens}; is the tokenizer "
                "that of another model?"
            )
        return ids

    @staticmethod
    def _string(text: object, name: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected a string")
        return text


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """The numbers of all rows, in batches of similar length so that little is padded."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def check_texts(texts: Any, name: str, *, plain: bool = False) -> Sequence[str]:
    """`texts` if it is a list that is not empty; otherwise raise a TypeError or ValueError.

    Args:
        texts: what a caller gave.
        name: what an error message calls it.
        plain: the list may be empty and of any type that has a length, but its rows must be strings, not messages.
    """
    if isinstance(texts, str) or not (plain or isinstance(texts, Sequence)):
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a list of strings")
    if not plain and not texts:
        raise ValueError(f"{name}: got none, expected at least one")
    for row, text in enumerate(texts if plain else (), 1):
        if not isinstance(text, str):
            raise TypeError(f"row {row} of {name}: got {type(text).__name__}, expected a string")
    return texts  # type: ignore[no-any-return]
