"""What every task returns, and what all tasks ask of a tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .examples import Example

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


def of_one_shape(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], words: Mapping[str, Sequence[str]]
) -> list[str]:
    """Those templates that have equally many tokens and each field at the same of them: the most common shape.

    Args:
        tokenizer: counts the tokens, special ones included.
        templates: texts with the fields of `words`.
        words: for each field what may stand there; the first two are tried, and what they change is the field's place.

    Raises:
        ValueError: fewer than two templates are of one shape.
    """
    shapes = [_shape(tokenizer, template, words) for template in templates]
    counts = Counter(shape for shape in shapes if shape)
    common = min(counts, key=lambda shape: (-counts[shape], shape), default=())
    if counts[common] < 2:
        raise ValueError(
            "aligned: with this tokenizer no two templates have equally many tokens and their fields at the same ones, "
            "expected two or more"
        )
    return [template for template, shape in zip(templates, shapes, strict=True) if shape == common]


def _shape(
    tokenizer: PreTrainedTokenizerBase, template: str, words: Mapping[str, Sequence[str]]
) -> tuple[tuple[int, ...], ...]:
    """((number of tokens), (places of the first field), …); () where a filling changes the number."""
    first = {field: choice[0] for field, choice in words.items()}
    texts = [first, *(first | {field: choice[-1 if len(choice) == 1 else 1]} for field, choice in words.items())]
    ids, *others = tokenizer([template.format(**filling) for filling in texts])["input_ids"]
    if any(len(other) != len(ids) for other in others):
        return ()
    places = (tuple(i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b) for other in others)
    return ((len(ids),), *places)


def held_out_templates(templates: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Templates for training and, a quarter of them, for held-out examples."""
    if len(templates) < 2:
        raise ValueError(f"templates: got {len(templates)}, expected at least two, of which one is held out")
    order = list(templates)
    rng.shuffle(order)
    held_out = max(len(order) // 4, 1)
    return order[held_out:], order[:held_out]


def checked_templates(templates: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Templates of one's own as a list; each has all fields and no others, and ends where the answer begins."""
    if isinstance(templates, str):
        raise TypeError("templates: got a string, expected a list of strings")
    texts = list(templates)
    if not texts:
        raise ValueError("templates: got none, expected at least one")
    marks = {field: f"@{field}@" for field in fields}
    names = ", ".join(f"{{{field}}}" for field in fields[:-1]) + f" and {{{fields[-1]}}}"
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"templates: got a {type(text).__name__}, expected a list of strings")
        try:
            made = text.format(**marks)
        except (KeyError, IndexError, ValueError, AttributeError):
            made = ""
        if not all(mark in made for mark in marks.values()):
            raise ValueError(f"templates: got {text!r}, expected the fields {names} and no others")
        if text != text.rstrip():
            raise ValueError(f"templates: {text!r} ends with a space, which belongs to the answer")
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ValueError(f"templates: got {twice!r} more than once, so that it could be on both sides")
    return texts


def check_count(name: str, value: int) -> None:
    """Refuse anything but a whole number that is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")


def tries(wanted: int) -> int:
    """How often to draw before a task is found to make too few different examples."""
    return 100 * wanted + 1000


def enough(made: Iterable[Example], wanted: int) -> list[Example]:
    """The examples that were drawn, where there are enough of them."""
    examples = list(made)
    if len(examples) < wanted:
        raise ValueError(f"tokenizer: its words make only {len(examples)} different examples, expected {wanted}")
    return examples
