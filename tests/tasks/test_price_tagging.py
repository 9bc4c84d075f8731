"""The two tasks of interchanges: their causal models, and that neither keeping nor copying an answer solves them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import word_models

import actscale_fast as af
from actscale_fast import tasks
from actscale_fast.tasks.price_tagging import PRICE_TEMPLATE

MARKS = PRICE_TEMPLATE.format(lower="0 . 1 2 3 4", upper="5 6 7", cost="8 9 00 yes no")


def price_words() -> Any:
    """A tokenizer that knows amounts digit by digit."""
    from tokenizers import Regex, pre_tokenizers

    words = word_models.tokenizer([MARKS])
    digits = pre_tokenizers.Split(Regex(r"\d|\.|:|,|[a-zA-Z]+"), "removed", invert=True)
    words.backend_tokenizer.pre_tokenizer = digits
    return words


def variables(prompt: str) -> tuple[bool, bool]:
    """(cost ≥ lower bound, cost ≤ upper bound), read from the prompt."""
    lower, upper, cost = (float(number) for number in re.findall(r"\d\.\d\d", prompt))
    assert lower < upper
    return cost >= lower, cost <= upper


def answer(*both: bool) -> str:
    return " yes" if all(both) else " no"


@pytest.mark.parametrize("variable", ["lower", "upper"])
def test_the_correct_answer_is_that_of_the_causal_model_under_the_interchange(variable: Any) -> None:
    for side in tasks.price_tagging(price_words(), n_train=80, n_test=40, seed=2, variable=variable):
        for example in side:
            base, source = variables(example.prompt), variables(example.source or "")
            mixed = (source[0], base[1]) if variable == "lower" else (base[0], source[1])
            assert example.correct == answer(*mixed)
            assert {example.correct, example.wrong} == {" yes", " no"}


@pytest.mark.parametrize("variable", ["lower", "upper"])
def test_no_rule_without_the_variable_is_right_more_often_than_every_second_time(variable: Any) -> None:
    for side in tasks.price_tagging(price_words(), n_train=80, n_test=40, seed=2, variable=variable):
        for label in (" yes", " no"):
            of_label = [example for example in side if example.correct == label]
            assert len(of_label) == len(side) / 2
            kept = sum(answer(*variables(example.prompt)) == label for example in of_label)
            copied = sum(answer(*variables(example.source or "")) == label for example in of_label)
            assert kept == copied == len(of_label) / 2


def test_prompts_are_aligned_and_held_out_pairs_have_brackets_of_their_own() -> None:
    words = price_words()
    train, test = tasks.price_tagging(words, n_train=80, n_test=40)
    prompts = [[prompt for e in side for prompt in (e.prompt, e.source or "")] for side in (train, test)]
    assert len({len(words(prompt)["input_ids"]) for side in prompts for prompt in side}) == 1
    brackets = [{tuple(re.findall(r"\d\.\d\d", prompt)[:2]) for prompt in side} for side in prompts]
    assert brackets[0].isdisjoint(brackets[1])
    assert len(set(train)) == len(train)


def test_one_seed_gives_one_task() -> None:
    for task, words in ((tasks.price_tagging, price_words()), (tasks.name_order, word_models.tokenizer(TEXTS))):
        first = task(words, n_train=24, n_test=8, seed=7)
        assert first == task(words, n_train=24, n_test=8, seed=7)
        assert first.train != task(words, n_train=24, n_test=8, seed=8).train


TEXTS = [*tasks.ALIGNED_INDIRECT_OBJECT_TEMPLATES, *word_models.TEXTS]


def names_of(prompt: str) -> tuple[list[str], str]:
    """(the two names in their order, the giver)."""
    found = [word for word in re.findall(r"\w+", prompt) if word in word_models.words._NAMES]
    return found[:2], found[2]


def test_the_answer_to_a_source_order_is_a_name_of_the_base() -> None:
    words = word_models.tokenizer(TEXTS)
    for side in tasks.name_order(words, n_train=80, n_test=40, seed=3):
        same = 0
        for example in side:
            (first, second), giver = names_of(example.prompt)
            others, other_giver = names_of(example.source or "")
            assert {first, second}.isdisjoint(others)
            assert example.correct.strip() == (first if other_giver == others[1] else second)
            assert {example.correct.strip(), example.wrong.strip()} == {first, second}
            same += (giver == second) == (other_giver == others[1])
        assert same == len(side) / 2


def test_names_stand_at_the_same_tokens_and_templates_are_held_out() -> None:
    words = word_models.tokenizer(TEXTS)
    train, test = tasks.name_order(words, n_train=80, n_test=40)
    names, skeletons = set(word_models.words._NAMES), []
    places = set()
    for side in (train, test):
        prompts = [prompt for e in side for prompt in (e.prompt, e.source or "")]
        for prompt in prompts:
            tokens = words.tokenize(prompt)
            places.add((len(tokens), *(i - len(tokens) for i, token in enumerate(tokens) if token in names)))
        skeletons.append({prompt.split(" ")[0] + prompt.split(" ")[4] for prompt in prompts})
    assert len(places) == 1
    assert places.pop()[-1] == -5
    assert skeletons[0].isdisjoint(skeletons[1])


@pytest.mark.parametrize(
    ("task", "words", "arguments", "error", "message"),
    [
        ("price_tagging", price_words, {"n_train": 0}, ValueError, "n_train: got 0, expected at least 1"),
        ("price_tagging", price_words, {"variable": "both"}, ValueError, "variable: got 'both', expected 'lower' or"),
        ("price_tagging", word_models.tokenizer, {}, ValueError, "tokenizer: yes and no must be single tokens"),
        ("name_order", word_models.tokenizer, {"n_test": 2.0}, TypeError, "n_test: got float, expected an int"),
        ("name_order", price_words, {}, ValueError, "tokenizer: only 0 names are one token, expected at least 4"),
    ],
)
def test_what_makes_no_task_is_refused(
    task: str, words: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(tasks, task)(words(), **arguments)


@pytest.mark.real_model
def test_the_real_model_plays_the_game_of_names(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    _, test = tasks.name_order(tokenizer, n_train=1, n_test=48)
    own = []
    for example in test:
        (first, second), giver = names_of(example.prompt)
        own.append(af.Example(example.prompt, f" {second if giver == first else first}", f" {giver}"))
    assert af.evaluate(model, tokenizer, own, af.ActivScalar.for_model(model)).flip_to_correct >= 0.8
