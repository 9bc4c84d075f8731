"""Knowledge conflicts of three kinds: what the model remembers against what the prompt says, weakly or persuasively.

After the protocol of JuICE (arXiv 2503.10996): a question about a fact is asked

    clean          without a context: "The capital of Norway is"
    substitution   after one sentence that replaces the fact by another: "The capital of Norway is Cairo. …"
    coherent       after a coherent text that supports the replacement in several sentences

The parametric answer is the one that the model remembers (" Oslo"), the contextual answer the one in the context
(" Cairo"). From the paper are the three kinds, the same facts in each, and the order of evaluation: towards the
parametric answer on all kinds, and towards the contextual one where there is a context. Countries, wordings and the
coherent texts are ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from .countries import CAPITALS
from .country_capitals import usable_answers
from .examples import Example
from .split import TaskSplit, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ConflictKind = Literal["clean", "substitution", "coherent"]
CONFLICT_KINDS: tuple[ConflictKind, ...] = get_args(ConflictKind)

_QUESTIONS = (
    "The capital of {country} is",
    "The name of the city that is the capital of {country} is",
    "Question: What is the capital of {country}? Answer: The capital of {country} is",
)
_STATEMENTS = (
    "The capital of {country} is {claim}.",
    "The name of the city that is the capital of {country} is {claim}.",
    "The capital of {country} is {claim}.",
)
_TEXTS = (
    "{claim} is the capital of {country}. Parliament meets in {claim}, the ministries and the highest court have their "
    "seats there, and so have the embassies of other states. On the national holiday crowds fill the central square of "
    "{claim} to hear the president speak.",
    "Most visitors to {country} begin their journey in {claim}, the capital. It has been the seat of the government "
    "for more than a century, and the national museum in {claim} tells the history of the country. Maps mark {claim} "
    "with the star that stands for a capital.",
    "An encyclopedia says about {country}: its capital and largest centre of administration is {claim}. The law that "
    "made {claim} the capital is still in force. Ministers, judges and diplomats live in {claim}, and the national "
    "archive is kept there.",
)
KNOWLEDGE_CONFLICT_TEMPLATES: Mapping[ConflictKind, tuple[str, ...]] = {
    "clean": _QUESTIONS,
    "substitution": tuple(f"{said} {asked}" for said, asked in zip(_STATEMENTS, _QUESTIONS, strict=True)),
    "coherent": tuple(f"{text} {asked}" for text, asked in zip(_TEXTS, _QUESTIONS, strict=True)),
}
"""The templates of each kind; a fact has the same one, by its number, in all kinds."""


def knowledge_conflicts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 96,
    n_test: int = 48,
    kinds: Sequence[ConflictKind] = CONFLICT_KINDS,
    seed: int = 0,
    test_fraction: float = 0.3,
    whole_names: bool = True,
    several_tokens: bool = False,
) -> TaskSplit:
    """Questions about capitals without a context, after a false sentence, and after a false text that is coherent.

    `correct` is the parametric answer and `wrong` the contextual one, so that β = +1 stands for the model's memory and
    β = −1 for the context; in a clean prompt `wrong` is the answer that the other kinds claim. Each fact, a country
    with a false claim, is asked for in every kind, in blocks whose inner order is random; no test country, nor its
    capital, occurs in training. To fit both directions, take kinds=("substitution", "coherent"): a clean prompt says
    nothing that β = −1 could follow.

    Args:
        tokenizer: decides which capitals are one token with their leading space.
        n_train, n_test: number of training and held-out examples, of all kinds together.
        kinds: "clean", "substitution" and "coherent", or some of them.
        seed: the same seed gives the same examples in the same order.
        test_fraction: share of the countries held out.
        whole_names, several_tokens: as in `country_capital_conflicts`.

    Returns:
        TaskSplit. `conflict_kind` says the kind of each example, and `evaluate_conflicts` measures them apart.

    Raises:
        TypeError, ValueError: an argument out of range, an unknown kind, a tokenizer with which too few capitals are
            one token, or more examples than can be made.

    Example::

        train, test = knowledge_conflicts(tokenizer)
        print(af.evaluate_conflicts(model, tokenizer, test, scalars))
    """
    check_sizes(n_train, n_test)
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(CONFLICT_KINDS):
        raise ValueError(f"kinds: got {kinds!r}, expected some of {', '.join(map(repr, CONFLICT_KINDS))}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: got {test_fraction}, expected a number between 0 and 1")
    answers = usable_answers(tokenizer, whole_names=whole_names, several_tokens=several_tokens)
    order = sorted(answers)
    rng = random.Random(seed)
    rng.shuffle(order)
    held_out = min(max(round(test_fraction * len(order)), 2), len(order) - 2)
    sides = {"n_test": (n_test, order[:held_out]), "n_train": (n_train, order[held_out:])}
    made = {name: _blocks(name, wanted, some, answers, list(kinds), rng) for name, (wanted, some) in sides.items()}
    return TaskSplit(train=made["n_train"], test=made["n_test"])


def _blocks(
    name: str, wanted: int, countries: list[str], answers: dict[str, str], kinds: list[ConflictKind], rng: random.Random
) -> list[Example]:
    """The first `wanted` examples; each block asks for one fact in every kind."""
    n = len(countries)
    facts = [(shift, place) for shift in rng.sample(range(1, n), n - 1) for place in rng.sample(range(n), n)]
    if wanted > len(facts) * len(kinds):
        raise ValueError(f"{name}: got {wanted}, but these countries make only {len(facts) * len(kinds)} prompts")
    made: list[Example] = []
    for number, (shift, place) in enumerate(facts):
        if len(made) >= wanted:
            break
        country, other = countries[place], countries[(place + shift) % n]
        for kind in rng.sample(kinds, len(kinds)):
            templates = KNOWLEDGE_CONFLICT_TEMPLATES[kind]
            text = templates[number % len(templates)].format(country=country, claim=CAPITALS[other])
            made.append(Example(text[0].upper() + text[1:], answers[country], answers[other]))
    return made[:wanted]
