"""The built-in tasks: what is held out stays out, answers fit the tokenizer, seeds decide everything."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import word_models

from actscale_fast import tasks
from actscale_fast.tasks.countries import CAPITALS

COUNTRY_OF = {capital: country for country, capital in CAPITALS.items()}


@pytest.fixture(scope="module")
def words() -> Any:
    return word_models.tokenizer()


@pytest.fixture(scope="module")
def few_words() -> Any:
    """For alignment, which tokenizes every prompt that could be made."""
    return word_models.tokenizer(without=word_models.LATE_CAPITALS)


def test_the_correct_answer_is_the_countrys_capital_and_the_wrong_one_the_claim(words: Any) -> None:
    for side in tasks.country_capital_conflicts(words, n_train=300, n_test=100, seed=3):
        for example in side:
            capital = example.correct.removeprefix(" ")
            assert COUNTRY_OF[capital].removeprefix("the ") in example.prompt
            assert example.wrong.removeprefix(" ") in example.prompt
            assert not re.search(rf"\b{re.escape(capital)}\b", example.prompt)
            assert example.correct.startswith(" ")
            assert example.wrong.startswith(" ")


def test_no_held_out_country_or_capital_occurs_in_training(words: Any) -> None:
    train, test = tasks.country_capital_conflicts(words, n_train=2000, n_test=600, seed=5)
    answers = [{answer for e in side for answer in (e.correct, e.wrong)} for side in (train, test)]
    assert answers[0].isdisjoint(answers[1])
    assert len(answers[1]) > 10
    training_text = "\n".join(example.prompt for example in train)
    for capital in answers[1]:
        country = COUNTRY_OF[capital.removeprefix(" ")]
        assert not re.search(rf"\b{re.escape(capital.strip())}\b", training_text)
        assert not re.search(rf"capital of {re.escape(country)}( is|\?)", training_text)


def test_countries_and_claims_are_asked_for_evenly_and_no_prompt_twice(words: Any) -> None:
    train, test = tasks.country_capital_conflicts(words, n_train=500, n_test=200)
    for side in (train, test):
        assert len({example.prompt for example in side}) == len(side)
        for field in ("correct", "wrong"):
            counts = Counter(getattr(example, field) for example in side).values()
            assert max(counts) - min(counts) <= 1 + (len(side) % len(counts) > 0)


def test_every_combination_occurs_exactly_once_when_all_are_wanted(words: Any) -> None:
    few = word_models.tokenizer(without={c for c in CAPITALS.values() if c > "C"})
    n = sum(len(few.tokenize(f" {capital}")) == 1 and capital <= "C" for capital in CAPITALS.values())
    held_out = round(0.3 * n)
    sizes = [count * (count - 1) * len(tasks.CONFLICT_TEMPLATES) for count in (n - held_out, held_out)]
    train, test = tasks.country_capital_conflicts(few, n_train=sizes[0], n_test=sizes[1])
    assert len({e.prompt for e in train}) == sizes[0]
    assert len({e.prompt for e in test}) == sizes[1]
    with pytest.raises(ValueError, match=f"n_test: got {sizes[1] + 1}, .* make only {sizes[1]} prompts"):
        tasks.country_capital_conflicts(few, n_train=1, n_test=sizes[1] + 1)


@pytest.mark.parametrize("task", [tasks.country_capital_conflicts, tasks.indirect_object_identification])
def test_one_seed_gives_one_task(words: Any, task: Any) -> None:
    first = task(words, n_train=40, n_test=20, seed=7)
    assert first == task(words, n_train=40, n_test=20, seed=7)
    assert first.train != task(words, n_train=40, n_test=20, seed=8).train


@pytest.mark.parametrize("task", [tasks.country_capital_conflicts, tasks.indirect_object_identification])
def test_aligned_prompts_have_equally_many_tokens(few_words: Any, task: Any) -> None:
    train, test = task(few_words, n_train=60, n_test=20, aligned=True)
    assert len({len(few_words(example.prompt)["input_ids"]) for example in train + test}) == 1


def test_only_capitals_of_one_token_are_used() -> None:
    missing = {"Paris", "Berlin", "Rome"}
    for side in tasks.country_capital_conflicts(word_models.tokenizer(without=missing), n_train=1500, n_test=500):
        for example in side:
            assert not missing & {example.correct.strip(), example.wrong.strip()}


def test_fragments_widen_the_choice_when_whole_names_are_not_asked_for(words: Any) -> None:
    whole, wide = (
        tasks.country_capital_conflicts(words, n_train=3000, n_test=900, whole_names=flag) for flag in (True, False)
    )
    answers = [{example.correct for side in task for example in side} for task in (whole, wide)]
    assert answers[0] < answers[1]
    assert " Buenos" in answers[1]
    assert " San" not in answers[1]  # San Jose and San Salvador begin alike
    assert " Mexico" not in answers[1]  # the question would hold the answer
    for example in (example for side in wide for example in side):
        assert len(words.tokenize(example.correct)) == 1


def test_whole_names_of_several_tokens_widen_the_choice_too(words: Any) -> None:
    sides = tasks.country_capital_conflicts(words, n_train=3000, n_test=900, several_tokens=True)
    answers = {example.correct for side in sides for example in side}
    assert {" Addis Ababa", " San Jose", " San Salvador", " Paris"} <= answers
    assert " Mexico City" not in answers  # the question would hold half of the answer
    assert answers <= {f" {capital}" for capital in CAPITALS.values()}
    with pytest.raises(ValueError, match="several_tokens: got True with whole_names=False"):
        tasks.country_capital_conflicts(words, whole_names=False, several_tokens=True)


def test_a_tokenizer_that_leaves_too_few_countries_is_refused_with_the_count() -> None:
    rare = word_models.tokenizer(["A : the capital of Paris Rome Berlin"])
    with pytest.raises(ValueError, match=rf"tokenizer: only 3 of {len(CAPITALS)} capitals .* at least 8; whole_names"):
        tasks.country_capital_conflicts(rare)
    with pytest.raises(ValueError, match="tokenizer: only 0 names are one token, expected at least 2"):
        tasks.indirect_object_identification(rare)


@pytest.mark.parametrize(
    ("templates", "error", "message"),
    [
        ([], ValueError, "templates: got none"),
        ("The capital of {country} is {claim}", TypeError, "expected a list of strings"),
        (["The capital of {country} is"], ValueError, "expected the fields"),
        (["{country} {claim} {other}"], ValueError, "and no others"),
        (["{country} {claim} {0}"], ValueError, "and no others"),
        (["{country {claim}"], ValueError, "expected the fields"),
        (["{country}: {claim}. A: "], ValueError, "ends with a space"),
    ],
)
def test_bad_templates_are_refused(words: Any, templates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.country_capital_conflicts(words, templates=templates)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_train": 0}, ValueError, "n_train: got 0, expected at least 1"),
        ({"n_test": 2.0}, TypeError, "n_test: got float, expected an int"),
        ({"n_train": 10**9}, ValueError, "n_train: got 1000000000, but .* make only"),
    ],
)
def test_impossible_sizes_are_refused(
    words: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    for task in (tasks.country_capital_conflicts, tasks.indirect_object_identification):
        with pytest.raises(error, match=message):
            task(words, **arguments)


def test_own_templates_begin_with_a_capital_letter(words: Any) -> None:
    templates = ["{country} has the capital {claim}. The capital of {country} is"]
    train, _ = tasks.country_capital_conflicts(words, n_train=400, n_test=20, templates=templates)
    assert any(example.prompt.startswith("The Netherlands has") for example in train + _)
    assert all(example.prompt[0].isupper() for example in train)


def test_the_indirect_object_is_the_name_that_occurs_once(words: Any) -> None:
    for side in tasks.indirect_object_identification(words, n_train=200, n_test=100):
        assert len({example.prompt for example in side}) == len(side)
        orders = Counter()
        for example in side:
            receiver, giver = example.correct.strip(), example.wrong.strip()
            spoken = re.findall(r"\w+", example.prompt)
            assert (spoken.count(receiver), spoken.count(giver)) == (1, 2)
            orders[spoken.index(receiver) < spoken.index(giver)] += 1
        assert orders[True] == orders[False]


def test_held_out_sentences_have_templates_of_their_own(words: Any) -> None:
    def skeletons(side: list[Any]) -> set[str]:
        given = set(word_models.words._NAMES + word_models.words._PLACES + word_models.words._THINGS)
        return {" ".join(w for w in re.findall(r"\w+", e.prompt) if w not in given) for e in side}

    train, test = tasks.indirect_object_identification(words, n_train=500, n_test=200)
    assert skeletons(train).isdisjoint(skeletons(test))
    assert len(skeletons(train)) + len(skeletons(test)) == len(tasks.INDIRECT_OBJECT_TEMPLATES)


def template_of(example: Any, templates: tuple[str, ...] = tasks.CONFLICT_TEMPLATES) -> str:
    """The template that made a conflict's prompt."""
    country, claim = COUNTRY_OF[example.correct[1:]], example.wrong[1:]
    made = {text.format(country=country, claim=claim).lower(): text for text in templates}
    return made[example.prompt.lower()]


def test_held_out_templates_ask_for_any_country(words: Any) -> None:
    train, test = tasks.country_capital_conflicts(words, n_train=2000, n_test=600, split="template", seed=2)
    used = [{template_of(example) for example in side} for side in (train, test)]
    assert used[0].isdisjoint(used[1])
    assert (len(used[0]), len(used[1])) == (6, 2)
    assert {example.correct for example in train} == {example.correct for example in test}


def test_neither_countries_nor_templates_are_shared_when_both_are_held_out(words: Any) -> None:
    train, test = tasks.country_capital_conflicts(words, n_train=2000, n_test=600, split="both", seed=2)
    used, answers = (
        [{of(example) for example in side} for side in (train, test)] for of in (template_of, lambda e: e.correct)
    )
    assert used[0].isdisjoint(used[1])
    assert answers[0].isdisjoint(answers[1])
    by_country = tasks.country_capital_conflicts(words, n_train=2000, n_test=600, seed=2)
    assert answers == [{example.correct for example in side} for side in by_country]


def test_a_split_by_template_needs_two_of_them_and_a_known_name(words: Any) -> None:
    only = tasks.CONFLICT_TEMPLATES[:1]
    with pytest.raises(ValueError, match="templates: got 1, expected at least two"):
        tasks.country_capital_conflicts(words, templates=only, split="both")
    with pytest.raises(ValueError, match="split: got 'city', expected one of 'country', 'template', 'both'"):
        tasks.country_capital_conflicts(words, split="city")  # type: ignore[arg-type]


def test_aligned_takes_a_length_that_leaves_enough_on_both_sides(few_words: Any) -> None:
    # Three templates of one length, of which one may be held out, and one shorter that may be held out as well.
    long = [f"{word} : the capital of {{country}} is {{claim}} . The capital of {{country}} is" for word in "ABC"]
    short = "Capital of {country} : {claim} . Capital of {country} :"
    for seed in range(6):
        options = {"templates": [*long, short], "split": "template", "aligned": True, "seed": seed}
        train, test = tasks.country_capital_conflicts(few_words, n_train=50, n_test=50, **options)
        assert len({len(few_words(example.prompt)["input_ids"]) for example in train + test}) == 1


def test_aligned_conflicts_have_country_and_claim_at_the_same_tokens(few_words: Any) -> None:
    templates = tasks.ALIGNED_CONFLICT_TEMPLATES
    task = tasks.country_capital_conflicts(few_words, n_train=200, n_test=60, templates=templates, aligned=True)
    for example in task.train + task.test:
        tokens = few_words.tokenize(example.prompt)
        assert tokens.index(example.wrong[1:]) == tokens.index("is") + 1
        assert len(tokens) == len(few_words.tokenize(task.train[0].prompt))
        assert tokens.index("is") == few_words.tokenize(task.train[0].prompt).index("is")


def test_aligned_sentences_have_names_place_and_thing_at_the_same_tokens(words: Any) -> None:
    kinds = [set(kind) for kind in (word_models.words._NAMES, word_models.words._PLACES, word_models.words._THINGS)]
    train, test = tasks.indirect_object_identification(words, n_train=300, n_test=100, aligned=True)
    places = set()
    for example in train + test:
        tokens = re.findall(r"\w+|,", example.prompt)
        places.add((len(tokens), *(i for kind in kinds for i, token in enumerate(tokens) if token in kind)))
    assert len(places) == 1
    assert len(places.pop()) == 1 + 3 + 1 + 1


@pytest.mark.parametrize(("orders", "receiver_first"), [("ABBA", {True}), (["BABA"], {False})])
def test_one_order_of_names_can_be_asked_for(words: Any, orders: Any, receiver_first: set[bool]) -> None:
    for side in tasks.indirect_object_identification(words, n_train=60, n_test=20, orders=orders):
        found = {e.prompt.index(e.correct) < e.prompt.index(e.wrong) for e in side}
        assert found == receiver_first


@pytest.mark.parametrize("orders", [(), ("ABBA", "ABBA"), ("ABAB",), "AB"])
def test_unknown_orders_are_refused(words: Any, orders: Any) -> None:
    with pytest.raises(ValueError, match=r"orders: got .*, expected 'ABBA', 'BABA' or both"):
        tasks.indirect_object_identification(words, orders=orders)


SENTENCE = "When {first} and {second} came to the {place}, {giver} gave a {thing} to"


def test_own_sentences_are_split_between_the_sides(words: Any) -> None:
    own = [SENTENCE, SENTENCE.replace("When", "Since")]
    train, test = tasks.indirect_object_identification(words, n_train=60, n_test=20, templates=own)
    begun = [{example.prompt.split()[0] for example in side} for side in (train, test)]
    assert begun in ([{"When"}, {"Since"}], [{"Since"}, {"When"}])


@pytest.mark.parametrize(
    ("templates", "error", "message"),
    [
        ([SENTENCE], ValueError, "templates: got 1, expected at least two"),
        ([SENTENCE, SENTENCE.replace("{thing}", "pen")], ValueError, r"\{place\} and \{thing\} and no others"),
        ([SENTENCE, SENTENCE + " "], ValueError, "ends with a space"),
        (SENTENCE, TypeError, "expected a list of strings"),
    ],
)
def test_bad_sentences_are_refused(words: Any, templates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.indirect_object_identification(words, templates=templates)


def test_sentences_of_different_shapes_cannot_be_aligned(words: Any) -> None:
    own = [SENTENCE, "Then " + SENTENCE]
    with pytest.raises(ValueError, match="aligned: with this tokenizer no two templates"):
        tasks.indirect_object_identification(words, templates=own, aligned=True)


def test_no_capital_belongs_to_two_countries_and_none_stands_in_its_countrys_name() -> None:
    assert len(CAPITALS) > 180
    assert len(set(CAPITALS.values())) == len(CAPITALS)
    for country, capital in CAPITALS.items():
        assert country == country.strip()
        assert capital == capital.strip()
        assert not re.search(rf"\b{re.escape(capital)}\b", country)
