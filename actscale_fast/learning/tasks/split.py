"""What every task returns, and what all tasks ask of a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TaskSplit:
    """Examples to learn from and held-out ones; unpacks as `train, test = split`."""

    train: list[Example]
    test: list[Example]

    def __iter__(self) -> Iterator[list[Example]]:
        return iter((self.train, self.test))


def answer_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> dict[str, list[int]]:
    """The tokens that each word adds to a prompt that ends just before it, the space between them included.

    Words are tokenized behind a prompt, because some tokenizers split a word that opens a text differently.
    """
    words = list(words)
    before = "A:"
    prefix = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    joined = tokenizer([f"{before} {word}" for word in words], add_special_tokens=False)["input_ids"]
    added = {}
    for word, ids in zip(words, joined, strict=True):
        tail = list(ids[len(prefix) :]) if list(ids[: len(prefix)]) == prefix else []
        added[word] = [] if tokenizer.unk_token_id in tail else tail
    return added


def single_token_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[str]:
    """Those words that are one token behind a space, in their own order, each token taken once."""
    kept: dict[int, str] = {}
    for word, tokens in answer_tokens(tokenizer, words).items():
        if len(tokens) == 1:
            kept.setdefault(tokens[0], word)
    return list(kept.values())


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt, special ones included."""
    return [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]


def most_common(lengths: Iterable[int]) -> int:
    """The most frequent length; of equally frequent ones the shortest."""
    counts = Counter(lengths)
    return min(counts, key=lambda length: (-counts[length], length))


def check_count(name: str, value: int) -> None:
    """Refuse anything but a whole number that is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
