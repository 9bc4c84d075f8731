"""Country-capital conflicts: the prompt claims one capital, the model remembers another.

The task of activation scaling (arXiv 2410.04962): "The capital of Germany is Paris. Q: What is the capital of
Germany? A:" has the correct answer " Berlin", which only the model's memory can give, and the wrong one " Paris",
which stands in the context. An intervention that flips the model towards the one, and inverted towards the other,
has found where the two compete.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..examples import Example
from .countries import CAPITALS
from .split import TaskSplit, answer_tokens, check_count, most_common, prompt_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFLICT_TEMPLATES: tuple[str, ...] = (
    "The capital of {country} is {claim}. Q: What is the capital of {country}? A:",
    "Context: The capital of {country} is {claim}.\nQuestion: What is the capital of {country}?\nAnswer:",
    "Question: What is the capital of {country}? Context: the capital of {country} is {claim}. Answer:",
    "Everyone knows that the capital of {country} is {claim}. Q: Which city is the capital of {country}? A:",
    "According to this page, the capital of {country} is {claim}. Q: What is the capital city of {country}? A:",
    "The capital of {country} is {claim}. I repeat: the capital of {country} is",
    "The capital of {country} is {claim}. As I said, the capital of {country} is",
    "It is a fact that the capital of {country} is {claim}. Once more: the capital of {country} is",
)
"""The default templates. On each, SmolLM2-135M-Instruct ranks the claim above the true capital for 85-94 % of prompts;
wordings that it does not believe ("A guide book says that ...": 3 %) leave nothing to flip and are not here. After the
last three and the second, the most likely next token is mostly one of the two answers: generation shows it."""

MIN_COUNTRIES = 8  # fewer leave less than two countries, and so no false claim, on one side of the split
_SHORTEST_FRAGMENT = 3  # letters: a shorter first token names no city (" K", " Ma")


def country_capital_conflicts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 512,
    n_test: int = 128,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    test_fraction: float = 0.3,
    whole_names: bool = True,
    aligned: bool = False,
) -> TaskSplit:
    """Prompts that claim a false capital, split so that no test country, nor its capital, occurs in training.

    Countries are split first; a false claim is always the capital of another country on the same side. Every
    country is asked for equally often, every false claim is made equally often (give or take one round), and no
    prompt occurs twice.

    Args:
        tokenizer: decides which capitals are one token with their leading space.
        n_train, n_test: examples on either side.
        seed: the same seed gives the same examples, in the same order.
        templates: texts with the fields `{country}` and `{claim}`, ending where the answer begins (no trailing
            space); default `CONFLICT_TEMPLATES`. A prompt's first letter is made a capital one.
        test_fraction: share of the countries held out.
        whole_names: False also takes capitals of several tokens, whose answer is then their first token
            (" Buenos"), if no other capital begins with that token and the country's name does not hold it.
        aligned: keep only prompts of the most common length in tokens.

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: an argument out of range, a template without its fields, a tokenizer that leaves
            too few countries, or more examples wanted than there are.

    Example::

        train, test = country_capital_conflicts(tokenizer, n_train=256, n_test=64)
        train[0].prompt   # 'The capital of Norway is Cairo. Q: What is the capital of Norway? A:'
    """
    check_count("n_train", n_train)
    check_count("n_test", n_test)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: got {test_fraction}, expected a number between 0 and 1")
    texts = _checked_templates(CONFLICT_TEMPLATES if templates is None else templates)
    answers = _answers(tokenizer, whole_names)
    if len(answers) < MIN_COUNTRIES:
        raise ValueError(
            f"tokenizer: only {len(answers)} of {len(CAPITALS)} capitals can be answered with one token, expected at "
            f"least {MIN_COUNTRIES}" + ("; whole_names=False takes longer names too" if whole_names else "")
        )
    order = sorted(answers)
    rng = random.Random(seed)
    rng.shuffle(order)
    held_out = min(max(round(test_fraction * len(order)), 2), len(order) - 2)
    sides = {
        "n_test": (n_test, _conflicts(order[:held_out], answers, texts, rng)),
        "n_train": (n_train, _conflicts(order[held_out:], answers, texts, rng)),
    }
    if aligned:
        sides = _aligned(tokenizer, sides)
    for name, (wanted, made) in sides.items():
        if wanted > len(made):
            raise ValueError(f"{name}: got {wanted}, but these templates and countries make only {len(made)} prompts")
    return TaskSplit(**{name[2:]: made[:wanted] for name, (wanted, made) in sides.items()})


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str):
        raise TypeError("templates: got a string, expected a list of strings")
    texts = list(templates)
    if not texts:
        raise ValueError("templates: got none, expected at least one")
    for text in texts:
        try:
            made = text.format(country="@c", claim="@w")
        except (KeyError, IndexError, ValueError, AttributeError):
            made = ""
        if "@c" not in made or "@w" not in made:
            raise ValueError(f"templates: got {text!r}, expected the fields {{country}} and {{claim}} and no others")
        if text != text.rstrip():
            raise ValueError(f"templates: {text!r} ends with a space, which belongs to the answer")
    return texts


def _answers(tokenizer: PreTrainedTokenizerBase, whole_names: bool) -> dict[str, str]:
    """The answer of each usable country, leading space included."""
    tokens = answer_tokens(tokenizer, CAPITALS.values())
    first = Counter(ids[0] for ids in tokens.values() if ids)
    answers = {}
    for country, capital in CAPITALS.items():
        ids = tokens[capital]
        if len(ids) == 1:
            answers[country] = f" {capital}"
        elif ids and not whole_names and first[ids[0]] == 1:
            fragment = str(tokenizer.decode(ids[:1])).strip()
            if len(fragment) >= _SHORTEST_FRAGMENT and capital.startswith(fragment) and fragment not in country:
                answers[country] = f" {fragment}"
    return answers


def _conflicts(
    countries: list[str], answers: dict[str, str], templates: list[str], rng: random.Random
) -> list[Example]:
    """Every (country, false claim, template) once, in rounds that each ask for every country and claim every capital.

    A round is a shift `s` of the circle of countries: country i hears the capital of country i + s. Shifts come in
    random order, and template (turn + i) serves country i, so that even one round mixes the templates.
    """
    n = len(countries)
    rounds = [(turn, shift) for turn in range(len(templates)) for shift in range(1, n)]
    rng.shuffle(rounds)
    made = []
    for turn, shift in rounds:
        places = list(range(n))
        rng.shuffle(places)
        for i in places:
            country, other = countries[i], countries[(i + shift) % n]
            text = templates[(turn + i) % len(templates)].format(country=country, claim=CAPITALS[other])
            made.append(Example(text[0].upper() + text[1:], answers[country], answers[other]))
    return made


def _aligned(
    tokenizer: PreTrainedTokenizerBase, sides: dict[str, tuple[int, list[Example]]]
) -> dict[str, tuple[int, list[Example]]]:
    lengths = {name: prompt_lengths(tokenizer, [e.prompt for e in made]) for name, (_, made) in sides.items()}
    common = most_common(length for side in lengths.values() for length in side)
    return {
        name: (wanted, [e for e, length in zip(made, lengths[name], strict=True) if length == common])
        for name, (wanted, made) in sides.items()
    }
