"""Pairs for interchange interventions on indirect objects: was the giver named first or second?

The causal model of "When Mary and John came to the store, John handed a book to" -> " Mary":

    S = the giver is the second of the two names        answer = the first name if S, else the second

An interchange gives the base the S of a source with other names: the answer then is the base's first or second name as
the source's order says. No name of the source helps, so that what is moved has to be the order itself.
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
    """Bases and sources of indirect object identification; held-out pairs have templates of their own.

    Base and source have four different names and any two templates of one shape: all prompts have equally many tokens,
    and the giver stands at position −5. The source's order is the base's in half of the pairs. The frozen model
    therefore gives the counterfactual answer in half of them if it names indirect objects at all:
    SmolLM2-135M-Instruct does, for 98 % of the bases. Of 96 held-out pairs it gives the counterfactual answer to 50 %
    as it is, 79 % with all of layer 22's last token from the source, 56 % with half the axes of a random rotation, and
    84 % with those that 48 updates learned (256 pairs, default rates, some 40 s on one core; 86 % at rotation_lr=3e-3,
    two pairs more). One seed each.

    Args:
        tokenizer: decides which names, places and things are one token with their leading space.
        n_train, n_test: pairs on either side.
        seed: the same seed gives the same pairs, in the same order.

    Returns:
        TaskSplit of examples with a source: `correct` is the counterfactual answer, `wrong` the base's other name.

    Raises:
        TypeError, ValueError: a count below 1, a tokenizer that leaves too few words or templates.

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
