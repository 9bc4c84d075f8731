"""Indirect object identification: "When Mary and John went to the store, John gave a book to" -> " Mary", not " John".

This is the task of arXiv 2211.00593: of two names, the one that occurs once is the indirect object. Sentences in which
the repeated name came second have the form ABBA, the others BABA; both are equally frequent, so that no rule about the
order of names gives the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .examples import Example
from .split import TaskSplit, check_sizes, checked_templates, held_out_templates, of_one_shape, single_token_words

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

ALIGNED_INDIRECT_OBJECT_TEMPLATES: tuple[str, ...] = (
    INDIRECT_OBJECT_TEMPLATES[0],
    INDIRECT_OBJECT_TEMPLATES[-1],
    "After {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "While {first} and {second} sat in the {place}, {giver} passed a {thing} to",
    "Once {first} and {second} got to the {place}, {giver} showed a {thing} to",
    "Before {first} and {second} drove to the {place}, {giver} sold a {thing} to",
    "As {first} and {second} walked through the {place}, {giver} offered a {thing} to",
    "Because {first} and {second} worked at the {place}, {giver} lent a {thing} to",
    "Since {first} and {second} lived near the {place}, {giver} sent a {thing} to",
    "Whenever {first} and {second} stopped at the {place}, {giver} brought a {thing} to",
    "After {first} and {second} ran to the {place}, {giver} threw a {thing} to",
    "While {first} and {second} waited outside the {place}, {giver} returned a {thing} to",
)
"""The default with `aligned`: names, place and thing are at the same tokens in all 12 of them."""

_FIELDS = ("first", "second", "giver", "place", "thing")
_ORDERS = ("ABBA", "BABA")

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
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 512,
    n_test: int = 128,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    orders: Sequence[str] = _ORDERS,
    aligned: bool = False,
) -> TaskSplit:
    """Sentences with two names that end before their indirect object; held-out ones use other templates.

    Args:
        tokenizer: decides which names, places and things are one token with their leading space.
        n_train, n_test: number of training and held-out examples, in which the orders of names take turns.
        seed: the same seed gives the same examples in the same order.
        templates: two or more texts with the fields `{first}`, `{second}`, `{giver}`, `{place}` and `{thing}`, ending
            where the name begins (no trailing space); default `INDIRECT_OBJECT_TEMPLATES`.
        orders: "ABBA" (the giver is named second), "BABA" (the giver is named first), or both.
        aligned: use only templates of one shape: every prompt has the same number of tokens, and the two first names,
            the giver, the place and the thing are at the same tokens in all of them. The default is then
            `ALIGNED_INDIRECT_OBJECT_TEMPLATES`: with the tokenizers of SmolLM2, GPT-2, Llama 3, Qwen 3 and Gemma 3 all
            12 have one shape.

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: a count below 1, templates without their fields, unknown orders, a tokenizer with which
            too few words are one token (or, with `aligned`, too few templates have one shape), or more examples than
            can be made.

    Example::

        train, test = indirect_object_identification(tokenizer, n_train=256, n_test=64)
    """
    check_sizes(n_train, n_test)
    default = ALIGNED_INDIRECT_OBJECT_TEMPLATES if aligned else INDIRECT_OBJECT_TEMPLATES
    texts = checked_templates(default if templates is None else templates, _FIELDS)
    chosen = (orders,) if isinstance(orders, str) else tuple(orders)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(_ORDERS):
        raise ValueError(f"orders: got {orders!r}, expected 'ABBA', 'BABA' or both")
    words = sentence_words(tokenizer, 2)
    if aligned:
        texts = aligned_templates(tokenizer, texts, words)
    rng = random.Random(seed)
    of_train, of_test = held_out_templates(texts, rng)
    return TaskSplit(
        train=_sentences("n_train", n_train, of_train, chosen, words, rng),
        test=_sentences("n_test", n_test, of_test, chosen, words, rng),
    )


def sentence_words(tokenizer: PreTrainedTokenizerBase, n_names: int) -> dict[str, list[str]]:
    """The names (at least `n_names`), places and things that are one token with this tokenizer."""
    every = {"names": _NAMES, "places": _PLACES, "things": _THINGS}
    words = {kind: single_token_words(tokenizer, of_kind) for kind, of_kind in every.items()}
    for kind, least in (("names", n_names), ("places", 1), ("things", 1)):
        if len(words[kind]) < least:
            raise ValueError(f"tokenizer: only {len(words[kind])} {kind} are one token, expected at least {least}")
    return words


def aligned_templates(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], words: dict[str, list[str]]
) -> list[str]:
    """The templates of the most common shape."""
    names = words["names"]
    fields = {"first": names, "second": names[::-1], "giver": names, "place": words["places"], "thing": words["things"]}
    return of_one_shape(tokenizer, templates, fields)


def _sentences(
    argument: str,
    wanted: int,
    templates: list[str],
    orders: tuple[str, ...],
    words: dict[str, list[str]],
    rng: random.Random,
) -> list[Example]:
    """`wanted` different fillings, drawn without replacement as numbers in mixed radix; the orders take turns."""
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
        first, second = (receiver, giver) if orders[row % len(orders)] == "ABBA" else (giver, receiver)
        prompt = templates[t].format(first=first, second=second, giver=giver, place=places[place], thing=things[thing])
        made.append(Example(prompt, correct=f" {receiver}", wrong=f" {giver}"))
    return made
