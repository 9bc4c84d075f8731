"""The built-in tasks with the tokenizer of the demo model: how much there is, and where words stand."""

from __future__ import annotations

from typing import Any

import pytest

from actscale_fast import tasks
from actscale_fast.tasks.country_capitals import _answers
from actscale_fast.tasks.indirect_objects import _NAMES, _PLACES, _THINGS

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def tokenizer(demo_model: tuple[Any, Any]) -> Any:
    return demo_model[1]


def test_46_countries_have_a_capital_of_one_token_and_107_a_first_token_of_their_own(tokenizer: Any) -> None:
    assert (len(_answers(tokenizer, whole_names=True)), len(_answers(tokenizer, whole_names=False))) == (46, 107)


def test_fragments_bring_more_than_60_countries_to_either_kind_of_split(tokenizer: Any) -> None:
    for split, least in (("country", 74), ("template", 107), ("both", 74)):
        train, test = tasks.country_capital_conflicts(
            tokenizer, n_train=2000, n_test=400, whole_names=False, split=split
        )
        assert len({example.correct for example in train}) >= least
        assert len({example.correct for example in train + test}) == 107


def test_aligned_conflicts_have_the_same_tokens_but_for_country_claim_and_three_words(tokenizer: Any) -> None:
    train, test = tasks.country_capital_conflicts(
        tokenizer, n_train=400, n_test=100, templates=tasks.ALIGNED_CONFLICT_TEMPLATES, aligned=True, split="both"
    )
    rows = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer([e.prompt for e in train + test])["input_ids"]]
    assert len({len(row) for row in rows}) == 1
    same = [i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) == 1]
    length = len(rows[0])
    assert set(range(length)) - set(same) == {3, 5, 7, 8, 9, 10, length - 2}
    assert [rows[0][i] for i in same][:4] == ["The", "Ġcapital", "Ġof", "Ġis"]


def test_aligned_sentences_keep_12_templates_and_have_the_names_at_the_same_tokens(tokenizer: Any) -> None:
    train, test = tasks.indirect_object_identification(tokenizer, n_train=400, n_test=200, aligned=True)
    kinds = [{f"Ġ{word}" for word in words} for words in (_NAMES, _PLACES, _THINGS)]
    verbs = []
    for side in (train, test):
        rows = [tokenizer.tokenize(example.prompt) for example in side]
        places = {tuple(i for kind in kinds for i, token in enumerate(row) if token in kind) for row in rows}
        assert places == {(1, 3, 9, 7, 12)}
        assert {len(row) for row in rows} == {14}
        verbs.append({(row[0], row[4], row[10]) for row in rows})
    assert (len(verbs[0]), len(verbs[1])) == (9, 3)
    assert verbs[0].isdisjoint(verbs[1])


def test_years_are_split_digit_by_digit_and_eight_templates_are_of_one_shape(tokenizer: Any) -> None:
    train, test = tasks.greater_than(tokenizer, n_train=400, n_test=100, aligned=True)
    rows = [tokenizer.tokenize(example.prompt) for example in train + test]
    assert {tuple(i for i, token in enumerate(row) if token.isdigit()) for row in rows} == {(7, 8, 9, 10, 15, 16)}
    assert all(len(example.correct) == len(example.wrong) == 1 for example in train + test)
    assert len({(row[0], row[2], row[11]) for row in rows}) == 8
