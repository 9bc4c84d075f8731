"""Indirect object identification: "When Mary and John went to the store, John gave a book to" -> " Mary", not " John".

The task of arXiv 2211.00593: of two names the one that occurs once is the indirect object. Sentences in which the
repeated name came second are of the form ABBA, the others BABA; both occur equally often here, so that no rule about
the order of names answers them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .examples import Example
from .split import TaskSplit, check_count, checked_templates, held_out_templates, of_one_shape, single_token_words

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
"""The default of `aligned`: names, place and thing stand at the same tokens in all 12 of them."""

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
    """Sentences with two names whose indirect object is to be named; held-out sentences have templates of their own.

    Args:
        tokenizer: decides which names, places and things are one token with their leading space.
        n_train, n_test: examples on either side, of which the orders of names take turns.
        seed: the same seed gives the same examples, in the same order.
        templates: two or more texts with the fields `{first}`, `{second}`, `{giver}`, `{place}` and `{thing}`, ending
            where the name begins (no trailing space); default `INDIRECT_OBJECT_TEMPLATES`.
        orders: of the names: "ABBA" (the giver is named second), "BABA" (first), or both.
        aligned: use only templates of one shape: every prompt has equally many tokens, and each of the two first names,
            the giver, the place and the thing stand at the same token in all of them. The default is then
            `ALIGNED_INDIRECT_OBJECT_TEMPLATES`: 12, which the tokenizers of SmolLM2, GPT-2, Llama 3, Qwen 3 and Gemma 3
            all keep, so that 9 are for training and 3 held out.

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: a count below 1, templates without their fields, unknown orders, a tokenizer that leaves
            too few words (or, with `aligned`, too few templates), or more examples wanted than there are.

    Example::

        train, test = indirect_object_identification(tokenizer, n_train=256, n_test=64)
    """
    check_count("n_train", n_train)
    check_count("n_test", n_test)
    default = ALIGNED_INDIRECT_OBJECT_TEMPLATES if aligned else INDIRECT_OBJECT_TEMPLATES
    texts = checked_templates(default if templates is None else templates, _FIELDS)
    chosen = (orders,) if isinstance(orders, str) else tuple(orders)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(_ORDERS):
        raise ValueError(f"orders: got {orders!r}, expected 'ABBA', 'BABA' or both")
    words = {
        "names": single_token_words(tokenizer, _NAMES),
        "places": single_token_words(tokenizer, _PLACES),
        "things": single_token_words(tokenizer, _THINGS),
    }
    for kind, least in (("names", 2), ("places", 1), ("things", 1)):
        if len(words[kind]) < least:
            raise ValueError(f"tokenizer: only {len(words[kind])} {kind} are one token, expected at least {least}")
    if aligned:
        names, places, things = words["names"], words["places"], words["things"]
        slots = {"first": names, "second": names[::-1], "giver": names, "place": places, "thing": things}
        texts = of_one_shape(tokenizer, texts, slots)
    rng = random.Random(seed)
    of_train, of_test = held_out_templates(texts, rng)
    return TaskSplit(
        train=_sentences("n_train", n_train, of_train, chosen, words, rng),
        test=_sentences("n_test", n_test, of_test, chosen, words, rng),
    )


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
