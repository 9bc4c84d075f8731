"""Tasks in three parts, training, validation and test, that share neither the countries nor the templates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .country_capitals import examples_of_sides, false_claims, usable_answers
from .examples import Example
from .indirect_objects import _ORDERS, _sentences, aligned_templates, sentence_words
from .split import checked_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The share of the countries, or of the templates, that validation and test get.
VALIDATION, TEST = 0.15, 0.25


@dataclass(frozen=True, slots=True)
class ThreeWaySplit:
    """Examples to learn from, to choose settings by, and to judge by."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def conflicts_three_ways(
    tokenizer: PreTrainedTokenizerBase, counts: tuple[int, int, int], seed: int, templates: Sequence[str], *,
    aligned: bool = False, whole_names: bool = True,
) -> ThreeWaySplit:  # fmt: skip
    """Country-capital conflicts, where no country, nor its capital, occurs in two parts.

    Args:
        tokenizer, seed, aligned, whole_names: as in `country_capital_conflicts`.
        counts: the numbers of training, validation and test examples.
        templates: the wordings of all parts.

    Raises:
        ValueError: too few countries or prompts with this tokenizer.
    """
    answers = usable_answers(tokenizer, whole_names=whole_names, several_tokens=False)
    order = sorted(answers)
    rng = random.Random(seed)
    rng.shuffle(order)
    n_test, n_validation = (max(round(share * len(order)), 2) for share in (TEST, VALIDATION))
    n_held_out = n_test + n_validation
    parts = {"test": order[:n_test], "validation": order[n_test:n_held_out], "train": order[n_held_out:]}
    wanted = dict(zip(("train", "validation", "test"), counts, strict=True))
    texts = list(templates)
    sides = {name: (wanted[name], false_claims(some, texts, rng)) for name, some in parts.items()}
    return ThreeWaySplit(**examples_of_sides(tokenizer, sides, answers, aligned=aligned))


def sentences_three_ways(
    tokenizer: PreTrainedTokenizerBase, counts: tuple[int, int, int], seed: int, templates: Sequence[str], *,
    aligned: bool = False, orders: Sequence[str] = _ORDERS, own_templates: bool = True,
) -> ThreeWaySplit:  # fmt: skip
    """Indirect object identification, where each part has templates of its own.

    Args:
        tokenizer, seed, aligned, orders: as in `indirect_object_identification`.
        counts: the numbers of training, validation and test examples.
        templates: four or more texts.
        own_templates: False: all parts use all templates.

    Raises:
        ValueError: too few templates or prompts with this tokenizer.
    """
    words = sentence_words(tokenizer, 2)
    texts = checked_templates(templates, ("first", "second", "giver", "place", "thing"))
    if aligned:
        texts = aligned_templates(tokenizer, texts, words)
    rng = random.Random(seed)
    rng.shuffle(texts)
    parts = [texts] * 3
    if own_templates:
        if len(texts) < 4:
            raise ValueError(f"templates: got {len(texts)}, expected at least four, of which two are held out")
        n_test, n_validation = (max(round(share * len(texts)), 1) for share in (TEST, VALIDATION))
        n_held_out = n_test + n_validation
        parts = [texts[n_held_out:], texts[n_test:n_held_out], texts[:n_test]]
    names = ("n_train", "n_validation", "n_test")
    made = [
        _sentences(name, number, some, tuple(orders), words, rng)
        for name, number, some in zip(names, counts, parts, strict=True)
    ]
    return ThreeWaySplit(*made)
