"""Greater-than: "The war lasted from the year 1732 to the year 17" continues with a number above 32, not below.

This is the task of arXiv 2305.00586 with other nouns and sentences. The answer depends on how the tokenizer splits a
year: the last two digits where they are one token (GPT-2: " 17", "32"), else the next digit, which is the third where
every digit is a token (SmolLM2: "1", "7", "3", "2") and the fourth where three digits are (Llama 3: "173", "2").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .examples import Example
from .split import (
    TaskSplit,
    added_tokens,
    check_sizes,
    checked_templates,
    held_out_templates,
    of_one_shape,
    single_token_words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREATER_THAN_TEMPLATES: tuple[str, ...] = (
    "The {event} lasted from the year {year} to the year {stem}",
    "The {event} ran from the year {year} until the year {stem}",
    "The {event} went from the year {year} through the year {stem}",
    "The {event} stretched from the year {year} into the year {stem}",
    "This {event} extended from the year {year} to the year {stem}",
    "That {event} continued from the year {year} until the year {stem}",
    "Their {event} dragged from the year {year} into the year {stem}",
    "His {event} lasted from the year {year} through the year {stem}",
    "The {event} began in the year {year} and ended in the year {stem}",
    "From the year {year} the {event} went on and on, up to the year {stem}",
    "Having begun in the year {year}, the {event} was over by the year {stem}",
    "Records of the {event} cover the time between the year {year} and the year {stem}",
)
"""The built-in templates; held-out examples use a quarter of them, training the others. With each of them,
SmolLM2-135M-Instruct ranks the later year's digit above the earlier year's for 94-100 % of 32 prompts."""

_FIELDS = ("event", "year", "stem")
_EVENTS = [
    "war", "siege", "trial", "voyage", "reign", "strike", "famine", "drought", "plague", "campaign", "expedition",
    "project", "study", "journey", "search", "conflict", "revolt", "dispute", "marriage", "friendship", "alliance",
    "occupation", "partnership", "tour", "crisis", "experiment", "construction", "rebellion", "mission",
    "investigation",
]  # fmt: skip
_CENTURIES = range(11, 19)
_ENOUGH = 100  # of 800 years, how many a way to split them must fit


@dataclass(frozen=True, slots=True)
class _Year:
    """A year with which a prompt may start."""

    number: int
    stem: str  # its first digits, which the answer follows
    shown: str  # its digits in the place of the answer
    above: tuple[str, ...]  # answers that make a later year
    below: tuple[str, ...]  # answers that make an earlier year


def greater_than(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 512,
    n_test: int = 128,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    aligned: bool = False,
) -> TaskSplit:
    """Sentences about something that lasted from one year to a later one; held-out ones use other templates.

    A prompt ends within the second year, after the digits that both years share, and the answers have no leading space.
    The correct one makes a later year, the wrong one an earlier year; starting years are spread evenly over the
    answered digits. The correct answer is always the larger number, so an intervention that makes all large numbers
    more likely also flips the answers; only the KL of the other tokens reveals that.

    Args:
        tokenizer: decides which digits are answered, and which years and nouns are used.
        n_train, n_test: number of training and held-out examples.
        seed: the same seed gives the same examples in the same order.
        templates: two or more texts with the fields `{event}`, `{year}` and, at the end, `{stem}`, the digits before
            the answer; default `GREATER_THAN_TEMPLATES`.
        aligned: use only templates of one shape: every prompt has the same number of tokens, and the noun, the year and
            the stem are at the same tokens in all of them. Eight of the default templates have one shape.

    Returns:
        TaskSplit, which unpacks as `train, test`.

    Raises:
        TypeError, ValueError: a count below 1, templates without their fields, a tokenizer with which no answer is a
            single token (or, with `aligned`, too few templates have one shape), or more examples than can be made.

    Example::

        train, test = greater_than(tokenizer, n_train=256, n_test=64)
        train[0].prompt   # 'The siege lasted from the year 1732 to the year 17'
    """
    check_sizes(n_train, n_test)
    texts = checked_templates(GREATER_THAN_TEMPLATES if templates is None else templates, _FIELDS)
    for text in texts:
        if not text.endswith(" {stem}"):
            raise ValueError(f"templates: got {text!r}, expected it to end in ' {{stem}}'")
    events = single_token_words(tokenizer, _EVENTS)
    if not events:
        raise ValueError(f"tokenizer: none of {len(_EVENTS)} nouns is one token, expected at least one")
    years = _years(tokenizer)
    if aligned:
        shown = [str(year.number) for year in years]
        stems = [year.stem for year in years]
        choices = {"event": events, "year": [shown[0], shown[-1]], "stem": [stems[0], stems[-1]]}
        texts = of_one_shape(tokenizer, texts, choices)
    rng = random.Random(seed)
    of_train, of_test = held_out_templates(texts, rng)
    return TaskSplit(
        train=_sentences("n_train", n_train, of_train, events, years, rng),
        test=_sentences("n_test", n_test, of_test, events, years, rng),
    )


def _years(tokenizer: PreTrainedTokenizerBase) -> list[_Year]:
    """The years, split in the first way that fits the tokenizer."""
    for stem_digits, answer_digits in ((2, 2), (2, 1), (3, 1)):
        years = _split_years(tokenizer, stem_digits, answer_digits)
        if len(years) >= _ENOUGH:
            return years
    raise ValueError(
        "tokenizer: of a year such as 1732 neither the last two digits, nor the third, nor the fourth are one token, "
        "expected one of them"
    )


def _split_years(tokenizer: PreTrainedTokenizerBase, stem_digits: int, answer_digits: int) -> list[_Year]:
    """The years whose digits after the stem begin with a token of `answer_digits` digits, in order."""
    numbers = [str(100 * century + year) for century in _CENTURIES for year in range(100)]
    end = stem_digits + answer_digits
    texts = dict.fromkeys(number[:stop] for number in numbers for stop in (stem_digits, end, 4))
    ids = added_tokens(tokenizer, "year", texts)
    widths = [len(ids[number]) for number in numbers]
    width = max(set(widths), key=widths.count)
    usable: dict[str, dict[str, list[str]]] = {}  # stem -> digits of the answer -> years
    for number in numbers:
        stem, answered = number[:stem_digits], number[:end]
        whole, before = ids[number], ids[stem]
        one_more = before and ids[answered][:-1] == before and whole[: len(before) + 1] == ids[answered]
        if one_more and tokenizer.unk_token_id not in whole and len(whole) == width:
            usable.setdefault(stem, {}).setdefault(number[stem_digits:end], []).append(number)
    found = []
    for stem, by_digits in usable.items():
        for digits, members in by_digits.items():
            above = tuple(other for other in by_digits if other > digits)
            below = tuple(other for other in by_digits if other < digits)
            if above and below:
                found += [_Year(int(number), stem, digits, above, below) for number in members]
    return sorted(found, key=lambda year: year.number)


def _sentences(
    argument: str, wanted: int, templates: list[str], events: list[str], years: list[_Year], rng: random.Random
) -> list[Example]:
    """`wanted` different prompts, in rounds in which every answered digit occurs once."""
    strata: dict[str, list[_Year]] = {}
    for year in years:
        strata.setdefault(year.shown, []).append(year)
    size = len(templates) * len(events) * min(map(len, strata.values()))  # of the smallest
    if wanted > size * len(strata):
        raise ValueError(
            f"{argument}: got {wanted}, but these templates and years make only {size * len(strata)} prompts"
        )
    rounds = -(-wanted // len(strata))
    drawn = {
        shown: rng.sample(range(len(templates) * len(events) * len(members)), rounds)
        for shown, members in strata.items()
    }
    made = []
    for turn in range(rounds):
        order = list(strata)
        rng.shuffle(order)
        for shown in order:
            number, t = divmod(drawn[shown][turn], len(templates))
            place, event = divmod(number, len(events))
            year = strata[shown][place]
            prompt = templates[t].format(event=events[event], year=year.number, stem=year.stem)
            made.append(Example(prompt, correct=rng.choice(year.above), wrong=rng.choice(year.below)))
    return made[:wanted]
