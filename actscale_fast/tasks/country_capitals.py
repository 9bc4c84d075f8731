"""Country-capital conflicts: the prompt claims one capital, the model remembers another.

This is the task of activation scaling (arXiv 2410.04962). "The capital of Germany is Paris. Q: What is the capital of
Germany? A:" has the correct answer " Berlin", which only the model's memory can give, and the wrong answer " Paris",
which is in the context. An intervention that flips the model towards the one, and inverted towards the other, has found
where the two compete.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from .._suggestions import did_you_mean
from .countries import CAPITALS
from .examples import Example
from .split import TaskSplit, answer_tokens, check_sizes, checked_templates, held_out_templates, prompt_lengths

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
"""The default templates. With each of them, SmolLM2-135M-Instruct ranks the claim above the true capital for 85-94 % of
prompts; wordings that it does not believe ("A guide book says that ...": 3 %) leave nothing to flip and are left out.
After the second and the last three, the most likely next token is mostly one of the answers, so generation shows it."""

ALIGNED_CONFLICT_TEMPLATES: tuple[str, ...] = (
    "The capital of {country} is {claim}. As I said, the capital of {country} is",
    "The capital of {country} is {claim}. I repeat it: the capital of {country} is",
    "The capital of {country} is {claim}. Let me repeat: the capital of {country} is",
    "The capital of {country} is {claim}. You heard it: the capital of {country} is",
    "The capital of {country} is {claim}. Mark it down: the capital of {country} is",
    "The capital of {country} is {claim}. So once again, the capital of {country} is",
    "The capital of {country} is {claim}. So remember this: the capital of {country} is",
    "The capital of {country} is {claim}. And to repeat: the capital of {country} is",
)
"""Eight templates that differ in only three words: with `aligned`, country and claim are at the same tokens in all.

With each of them, SmolLM2-135M-Instruct ranks the claim above the true capital for 75-100 % of 32 prompts."""

Split = Literal["country", "template", "both"]

MIN_COUNTRIES = 8  # fewer leave only one country, and so no false claim, on one side of the split
_SHORTEST_FRAGMENT = 3  # letters; a shorter first token (" K", " Ma") identifies no city


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
    split: Split = "country",
    several_tokens: bool = False,
) -> TaskSplit:
    """Prompts that claim a false capital, split so that no test country, nor its capital, occurs in training.

    Countries (or templates, or both: see `split`) are split first; a false claim is always the capital of another
    country on the same side. Every country is asked for equally often, every false claim is made equally often (up to
    one round), and no prompt occurs twice.

    How many of the 184 countries are used depends on the tokenizer, which must make the capital one token unless
    `several_tokens` is set (in brackets the number with `whole_names=False`): SmolLM2 46 (107), GPT-2 52 (111), Llama 3
    and Qwen 3 54 (116), Gemma 3 91 (142), Mistral 7B 19 (82).

    Args:
        tokenizer: decides which capitals are one token with their leading space.
        n_train, n_test: number of training and held-out examples.
        seed: the same seed gives the same examples in the same order.
        templates: texts with the fields `{country}` and `{claim}`, ending where the answer begins (no trailing
            space); default `CONFLICT_TEMPLATES`. The first letter of a prompt is capitalised.
        test_fraction: share of the countries held out; of templates a quarter is held out.
        whole_names: False also uses capitals of several tokens, with their first token as the answer (" Buenos"), if no
            other capital begins with that token and the country's name does not contain it.
        aligned: keep only prompts of the most common length in tokens that leaves enough of them. With one template and
            whole names, the country and the claim are then at the same tokens in all of them; with several templates
            only if these have one shape, as `ALIGNED_CONFLICT_TEMPLATES` have.
        split: what training never sees. "country": the held-out countries and their capitals, in any template;
            "template": the held-out templates, with any country; "both": neither of them.
        several_tokens: also use capitals of several tokens, with the whole name as the answer (" Addis Ababa").

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: an argument out of range, a template without its fields, a tokenizer with which too few
            capitals are one token, or more examples than can be made.

    Example::

        train, test = country_capital_conflicts(tokenizer, n_train=256, n_test=64)
        train[0].prompt   # 'The capital of Norway is Cairo. Q: What is the capital of Norway? A:'
    """
    check_sizes(n_train, n_test)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction: got {test_fraction}, expected a number between 0 and 1")
    if split not in get_args(Split):
        names = get_args(Split)
        raise ValueError(
            f"split: got {split!r}, expected one of {', '.join(map(repr, names))}{did_you_mean(split, names)}"
        )
    texts = checked_templates(CONFLICT_TEMPLATES if templates is None else templates, ("country", "claim"))
    answers = usable_answers(tokenizer, whole_names=whole_names, several_tokens=several_tokens)
    order = sorted(answers)
    rng = random.Random(seed)
    rng.shuffle(order)
    held_out = min(max(round(test_fraction * len(order)), 2), len(order) - 2)
    countries = (order, order) if split == "template" else (order[held_out:], order[:held_out])
    of_train, of_test = (texts, texts) if split == "country" else held_out_templates(texts, rng)
    sides = {
        "n_test": (n_test, false_claims(countries[1], of_test, rng)),
        "n_train": (n_train, false_claims(countries[0], of_train, rng)),
    }
    examples = examples_of_sides(tokenizer, sides, answers, aligned=aligned)
    return TaskSplit(train=examples["n_train"], test=examples["n_test"])


class FalseClaim(NamedTuple):
    """That the capital of `other` is that of `country`; of a hundred thousand a few become examples."""

    country: str
    other: str
    template: str


def _example(claim: FalseClaim, answers: dict[str, str]) -> Example:
    return Example(_prompt(claim), answers[claim.country], answers[claim.other])


def _prompt(claim: FalseClaim) -> str:
    text = claim.template.format(country=claim.country, claim=CAPITALS[claim.other])
    return text[0].upper() + text[1:]


def examples_of_sides(
    tokenizer: PreTrainedTokenizerBase, sides: dict[str, tuple[int, list[FalseClaim]]], answers: dict[str, str], *,
    aligned: bool,
) -> dict[str, list[Example]]:  # fmt: skip
    """The first claims of each side as examples.

    Args:
        tokenizer, aligned: as in `country_capital_conflicts`.
        sides: by name, the number of examples and the claims to take them from.
        answers: of each country.

    Raises:
        ValueError: a side has too few claims.
    """
    if aligned:
        sides = _aligned(tokenizer, sides)
    for name, (wanted, claims) in sides.items():
        if wanted > len(claims):
            raise ValueError(f"{name}: got {wanted}, but these templates and countries make only {len(claims)} prompts")
    return {name: [_example(claim, answers) for claim in claims[:wanted]] for name, (wanted, claims) in sides.items()}


def usable_answers(tokenizer: PreTrainedTokenizerBase, *, whole_names: bool, several_tokens: bool) -> dict[str, str]:
    """The answer of each country that can be asked for; arguments and errors as in `country_capital_conflicts`."""
    if several_tokens and not whole_names:
        raise ValueError("several_tokens: got True with whole_names=False, expected one of the two")
    answers = _whole_answers(tokenizer) if several_tokens else _answers(tokenizer, whole_names)
    if len(answers) < MIN_COUNTRIES:
        raise ValueError(
            f"tokenizer: only {len(answers)} of {len(CAPITALS)} capitals can be answered with one token, expected at "
            f"least {MIN_COUNTRIES}" + ("; whole_names=False takes longer names too" if whole_names else "")
        )
    return answers


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


def _whole_answers(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The answers, without capitals that contain the country's name or whose tokens begin with another capital."""
    tokens = {capital: tuple(ids) for capital, ids in answer_tokens(tokenizer, CAPITALS.values()).items() if ids}
    known = set(tokens.values())
    kept = {
        capital for capital, ids in tokens.items() if not any(ids[:length] in known for length in range(1, len(ids)))
    }
    return {
        country: f" {capital}"
        for country, capital in CAPITALS.items()
        if capital in kept and country.removeprefix("the ") not in capital
    }


def false_claims(countries: list[str], templates: list[str], rng: random.Random) -> list[FalseClaim]:
    """Every (country, false claim, template) once, in rounds that each ask for every country and claim every capital.

    A round is a shift s on the circle of countries: country i is given the capital of country i + s. Shifts are in
    random order, and country i uses template (turn + i), so that even one round mixes the templates.
    """
    n = len(countries)
    rounds = [(turn, shift) for turn in range(len(templates)) for shift in range(1, n)]
    rng.shuffle(rounds)
    made = []
    for turn, shift in rounds:
        places = list(range(n))
        rng.shuffle(places)
        made += [
            FalseClaim(countries[i], countries[(i + shift) % n], templates[(turn + i) % len(templates)]) for i in places
        ]
    return made


def _aligned(
    tokenizer: PreTrainedTokenizerBase, sides: dict[str, tuple[int, list[FalseClaim]]]
) -> dict[str, tuple[int, list[FalseClaim]]]:
    lengths = {name: prompt_lengths(tokenizer, [_prompt(c) for c in claims]) for name, (_, claims) in sides.items()}
    counts = {name: Counter(lengths[name]) for name in sides}
    total = sum(counts.values(), Counter())

    def merit(length: int) -> tuple[bool, int, int]:
        enough = all(counts[name][length] >= wanted for name, (wanted, _) in sides.items())
        return enough, total[length], -length

    common = max(total, key=merit)
    return {
        name: (wanted, [c for c, length in zip(claims, lengths[name], strict=True) if length == common])
        for name, (wanted, claims) in sides.items()
    }
