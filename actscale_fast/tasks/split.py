"""What every task returns, and the words, templates and draws that tasks have in common."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TaskSplit:
    """Examples for training and held-out ones; unpacks as `train, test = split`."""

    train: list[Example]
    test: list[Example]

    def __iter__(self) -> Iterator[list[Example]]:
        return iter((self.train, self.test))


def added_tokens(tokenizer: PreTrainedTokenizerBase, before: str, texts: Iterable[str]) -> dict[str, list[int]]:
    """The tokens that a space and each text add to `before`; none where they merge with its tokens.

    Words are tokenized after others because some tokenizers split the first word of a text differently.
    """
    texts = list(texts)
    prefix = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    joined = tokenizer([f"{before} {text}" for text in texts], add_special_tokens=False)["input_ids"]
    return {
        text: list(ids[len(prefix) :]) if list(ids[: len(prefix)]) == prefix else []
        for text, ids in zip(texts, joined, strict=True)
    }


def answer_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> dict[str, list[int]]:
    """The tokens that each word adds to a prompt that ends just before it, including the space between them."""
    found = added_tokens(tokenizer, "A:", words)
    return {word: [] if tokenizer.unk_token_id in tokens else tokens for word, tokens in found.items()}


def single_token_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[str]:
    """The words that are a single token after a space, in their order; of words with the same token, the first."""
    kept: dict[int, str] = {}
    for word, tokens in answer_tokens(tokenizer, words).items():
        if len(tokens) == 1:
            kept.setdefault(tokens[0], word)
    return list(kept.values())


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """The number of tokens of each prompt, including special ones."""
    return [len(ids) for ids in tokenizer(list(prompts), return_attention_mask=False)["input_ids"]]


def of_one_shape(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], words: Mapping[str, Sequence[str]]
) -> list[str]:
    """The templates of the most common shape: the same number of tokens, and each field at the same tokens.

    Args:
        tokenizer: counts the tokens, including special ones.
        templates: texts with the fields of `words`.
        words: the words for each field; the tokens at which the first two differ are the field's.

    Raises:
        ValueError: fewer than two templates have the same shape.
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
    """((number of tokens,), (places of the first field), …); () where the number depends on the words."""
    first = {field: choice[0] for field, choice in words.items()}
    texts = [first, *(first | {field: choice[-1 if len(choice) == 1 else 1]} for field, choice in words.items())]
    ids, *others = tokenizer([template.format(**filling) for filling in texts])["input_ids"]
    if any(len(other) != len(ids) for other in others):
        return ()
    places = (tuple(i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b) for other in others)
    return ((len(ids),), *places)


def held_out_templates(templates: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """The templates for training, and a quarter of them for held-out examples."""
    if len(templates) < 2:
        raise ValueError(f"templates: got {len(templates)}, expected at least two, of which one is held out")
    order = list(templates)
    rng.shuffle(order)
    held_out = max(len(order) // 4, 1)
    return order[held_out:], order[:held_out]


def checked_templates(templates: Sequence[str], fields: Sequence[str]) -> list[str]:
    """The templates as a list; each must have all fields and no others, and end where the answer begins."""
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


def check_sizes(n_train: int, n_test: int) -> None:
    """Raise a TypeError or ValueError unless both are integers that are at least 1."""
    for name, value in (("n_train", n_train), ("n_test", n_test)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def distinct(wanted: int, draw: Callable[[int], Example | None], rng: random.Random) -> list[Example]:
    """`wanted` different examples in random order.

    Args:
        wanted: how many.
        draw: makes an example at random, given the number of those already kept; None: an unsuitable one.
        rng: shuffles the examples.

    Raises:
        ValueError: 100 draws per example (and 1000 more) did not give enough.
    """
    made: dict[Example, None] = {}
    for _ in range(100 * wanted + 1000):
        if len(made) == wanted:
            break
        example = draw(len(made))
        if example is not None:
            made[example] = None
    if len(made) < wanted:
        raise ValueError(
            f"tokenizer: only {len(made)} distinct examples can be built with this tokenizer, expected {wanted}"
        )
    examples = list(made)
    rng.shuffle(examples)
    return examples
