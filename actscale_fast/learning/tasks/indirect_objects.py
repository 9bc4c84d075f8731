"""Indirect object identification: "When Mary and John went to the store, John gave a book to" -> " Mary", not " John".

The task of arXiv 2211.00593: of two names the one that occurs once is the indirect object. Sentences in which the
repeated name came second are of the form ABBA, the others BABA; both occur equally often here, so that no rule about
the order of names answers them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..examples import Example
from .split import TaskSplit, check_count, most_common, prompt_lengths, single_token_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDIRECT_OBJECT_TEMPLATES: tuple[str, ...] = (
    "When {first} and {second} came to the {place}, {giver} handed a {thing} to",
    "After {first} and {second} had met at the {place}, {giver} passed a {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} offered a {thing} to",
    "Because {first} and {second} worked at the {place}, {giver} often lent a {thing} to",
    "As soon as {first} and {second} reached the {place}, {giver} showed a {thing} to",
    "Last week {first} and {second} walked to the {place}, and {giver} sold a {thing} to",
    "Before {first} and {second} left the {place}, {giver} threw a {thing} to",
    "Yesterday {first} and {second} were at the {place}, where {giver} gave a {thing} to",
    "Once {first} and {second} got lost near the {place}, so {giver} brought a {thing} to",
    "Then {first} and {second} talked outside the {place}, until {giver} returned a {thing} to",
    "Since {first} and {second} liked the {place}, {giver} sent a {thing} from there to",
    "Although {first} and {second} argued about the {place}, {giver} promised a {thing} to",
)
"""The built-in templates; held-out examples use a quarter of them, training the others."""

_NAMES = [
    "Mary", "John", "James", "Robert", "Michael", "David", "William", "Richard", "Thomas", "Charles", "Daniel",
    "Matthew", "Anthony", "Mark", "Paul", "Steven", "Andrew", "George", "Kevin", "Brian", "Edward", "Jason", "Ryan",
    "Jacob", "Eric", "Jonathan", "Stephen", "Larry", "Scott", "Frank", "Peter", "Henry", "Adam", "Simon", "Martin",
    "Anna", "Alice", "Emma", "Laura", "Sarah", "Karen", "Lisa", "Nancy", "Susan", "Linda", "Barbara", "Elizabeth",
    "Jennifer", "Maria", "Julia", "Kate", "Emily", "Rachel", "Helen",
]  # fmt: skip
_PLACES = [
    "store", "market", "school", "station", "park", "library", "office", "hospital", "beach", "garden", "museum",
    "restaurant", "church", "hotel",
]  # fmt: skip
_THINGS = [
    "book", "ring", "drink", "ball", "letter", "key", "ticket", "photo", "coat", "basket", "pen", "cup", "map", "bag",
    "hat", "phone", "box", "gift", "watch",
]  # fmt: skip


def indirect_object_identification(
    tokenizer: PreTrainedTokenizerBase, *, n_train: int = 512, n_test: int = 128, seed: int = 0, aligned: bool = False
) -> TaskSplit:
    """Sentences with two names whose indirect object is to be named; held-out sentences have templates of their own.

    Args:
        tokenizer: decides which names, places and things are one token with their leading space.
        n_train, n_test: examples on either side; half of each ABBA, half BABA.
        seed: the same seed gives the same examples, in the same order.
        aligned: use only templates of the most common length, so that every prompt has equally many tokens.

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: a count below 1, a tokenizer that leaves too few words (or, with `aligned`, too few
            templates), or more examples wanted than there are.

    Example::

        train, test = indirect_object_identification(tokenizer, n_train=256, n_test=64)
    """
    check_count("n_train", n_train)
    check_count("n_test", n_test)
    words = {
        "names": single_token_words(tokenizer, _NAMES),
        "places": single_token_words(tokenizer, _PLACES),
        "things": single_token_words(tokenizer, _THINGS),
    }
    for kind, least in (("names", 2), ("places", 1), ("things", 1)):
        if len(words[kind]) < least:
            raise ValueError(f"tokenizer: only {len(words[kind])} {kind} are one token, expected at least {least}")
    templates = list(INDIRECT_OBJECT_TEMPLATES)
    if aligned:
        templates = _of_one_length(tokenizer, templates, words)
    rng = random.Random(seed)
    rng.shuffle(templates)
    held_out = max(len(templates) // 4, 1)
    return TaskSplit(
        train=_sentences("n_train", n_train, templates[held_out:], words, rng),
        test=_sentences("n_test", n_test, templates[:held_out], words, rng),
    )


def _of_one_length(tokenizer: PreTrainedTokenizerBase, templates: list[str], words: dict[str, list[str]]) -> list[str]:
    a, b = words["names"][:2]
    slots = {"first": a, "second": b, "giver": a, "place": words["places"][0], "thing": words["things"][0]}
    lengths = prompt_lengths(tokenizer, [template.format(**slots) for template in templates])
    common = most_common(lengths)
    kept = [template for template, length in zip(templates, lengths, strict=True) if length == common]
    if len(kept) < 2:
        raise ValueError("aligned: with this tokenizer no two templates have equally many tokens, expected two or more")
    return kept


def _sentences(
    argument: str, wanted: int, templates: list[str], words: dict[str, list[str]], rng: random.Random
) -> list[Example]:
    """`wanted` different fillings, drawn without replacement as numbers in mixed radix; ABBA and BABA alternate."""
    names, places, things = words["names"], words["places"], words["things"]
    total = len(templates) * len(names) * (len(names) - 1) * len(places) * len(things)
    if wanted > total:
        raise ValueError(f"{argument}: got {wanted}, but these templates and words make only {total} prompts")
    made = []
    for row, number in enumerate(rng.sample(range(total), wanted)):
        number, t = divmod(number, len(templates))
        number, i = divmod(number, len(names))
        number, step = divmod(number, len(names) - 1)
        thing, place = divmod(number, len(places))
        giver, receiver = names[i], names[(i + 1 + step) % len(names)]
        first, second = (receiver, giver) if row % 2 == 0 else (giver, receiver)  # ABBA, then BABA
        prompt = templates[t].format(first=first, second=second, giver=giver, place=places[place], thing=things[thing])
        made.append(Example(prompt, correct=f" {receiver}", wrong=f" {giver}"))
    return made
