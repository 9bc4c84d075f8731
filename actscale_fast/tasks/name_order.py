"""Pairs for interchange interventions on indirect objects: was the giver named first or second?

The causal model of "When Mary and John came to the store, John handed a book to" -> " Mary":

    S = the giver is the second of the two names        answer = the first name if S, else the second

An interchange gives the base the S of a source with other names: the answer is then the base's first or second name,
according to the source's order. The source's names do not help, so what is moved must be the order itself.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .examples import Example
from .indirect_objects import ALIGNED_INDIRECT_OBJECT_TEMPLATES, aligned_templates, sentence_words
from .split import TaskSplit, check_sizes, distinct, held_out_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def name_order(tokenizer: PreTrainedTokenizerBase, *, n_train: int = 256, n_test: int = 64, seed: int = 0) -> TaskSplit:
    """Bases and sources of indirect object identification; held-out pairs use other templates.

    Base and source have four different names and any two templates of one shape: all prompts have the same number of
    tokens, and the giver is at position −5. In half of the pairs the source has the base's order, so a frozen model
    that names indirect objects gives the counterfactual answer in half of them. SmolLM2-135M-Instruct names 98 % of
    them; of 96 held-out pairs it gives the counterfactual answer in 50 % as it is, in 79 % with all of layer 22's last
    token from the source, in 56 % with half the axes of a random rotation, and in 84 % with those learned in 48 updates
    (256 pairs, default learning rates, about 40 s on one core; one seed).

    Args:
        tokenizer: decides which names, places and things are one token with their leading space.
        n_train, n_test: number of training and held-out pairs.
        seed: the same seed gives the same pairs in the same order.

    Returns:
        TaskSplit of examples with a source: `correct` is the counterfactual answer, `wrong` the base's other name.

    Raises:
        TypeError, ValueError: a count below 1, or a tokenizer with which too few words or templates fit.

    Example::

        train, test = name_order(tokenizer)
        das = BoundlessDAS.for_model(model, layers=[22], positions=[-1])
        fit_interchange(model, tokenizer, train, das)
    """
    check_sizes(n_train, n_test)
    words = sentence_words(tokenizer, 4)
    rng = random.Random(seed)
    sides = held_out_templates(aligned_templates(tokenizer, ALIGNED_INDIRECT_OBJECT_TEMPLATES, words), rng)
    return TaskSplit(
        *(_pairs(wanted, texts, words, rng) for wanted, texts in zip((n_train, n_test), sides, strict=True))
    )


def _pairs(wanted: int, templates: list[str], words: dict[str, list[str]], rng: random.Random) -> list[Example]:
    def draw(row: int) -> Example:
        own, other = row % 2, (row // 2) % 2  # S of the base and of the source
        names = rng.sample(words["names"], 4)
        base, source = (
            rng.choice(templates).format(
                first=pair[0], second=pair[1], giver=pair[giver],
                place=rng.choice(words["places"]), thing=rng.choice(words["things"]),
            )
            for pair, giver in ((names[:2], own), (names[2:], other))
        )  # fmt: skip
        return Example(base, correct=f" {names[1 - other]}", wrong=f" {names[other]}", source=source)

    return distinct(wanted, draw, rng)
