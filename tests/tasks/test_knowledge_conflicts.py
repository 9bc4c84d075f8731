"""Knowledge conflicts: the same facts in every kind, and what a prompt says about its task."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import word_models

from actscale_fast import tasks
from actscale_fast.cli import main
from actscale_fast.learning.head_selection.juice import scored_examples
from actscale_fast.tasks.countries import CAPITALS
from actscale_fast.tasks.known_prompts import family_of, paraphrased
from actscale_fast.tasks.split import checked_templates


@pytest.fixture(scope="module")
def words() -> Any:
    texts = [text for templates in tasks.KNOWLEDGE_CONFLICT_TEMPLATES.values() for text in templates]
    return word_models.tokenizer([*word_models.TEXTS, *texts])


def test_every_fact_is_asked_for_in_every_kind_and_held_out_capitals_stay_out(words: Any) -> None:
    train, test = tasks.knowledge_conflicts(words, n_train=60, n_test=30, seed=4)
    for side in (train, test):
        for start in range(0, len(side), 3):
            block = side[start : start + 3]
            assert {tasks.conflict_kind(example) for example in block} == set(tasks.CONFLICT_KINDS)
            assert len({(example.correct, example.wrong) for example in block}) == 1
        for example in side:
            claim, capital = example.wrong.strip(), example.correct.strip()
            assert (claim in example.prompt) == (tasks.conflict_kind(example) != "clean")
            assert capital not in example.prompt
            assert any(CAPITALS[country] == capital for country in CAPITALS if country in example.prompt)
    answers = [{answer for e in side for answer in (e.correct, e.wrong)} for side in (train, test)]
    assert answers[0].isdisjoint(answers[1])
    assert tasks.knowledge_conflicts(words, n_train=60, n_test=30, seed=4).test == test


def test_kinds_can_be_chosen_and_templates_are_well_formed(words: Any) -> None:
    train, _ = tasks.knowledge_conflicts(words, n_train=8, n_test=2, kinds=("coherent", "substitution"))
    assert Counter(map(tasks.conflict_kind, train)) == {"coherent": 4, "substitution": 4}
    for kind, templates in tasks.KNOWLEDGE_CONFLICT_TEMPLATES.items():
        checked_templates(templates, ("country",) if kind == "clean" else ("country", "claim"))
    for kinds in ("clean", (), ("clean", "clean"), ("other",)):
        with pytest.raises(ValueError, match="kinds: got"):
            tasks.knowledge_conflicts(words, kinds=kinds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_test: got 99999, but these countries make only"):
        tasks.knowledge_conflicts(words, n_test=99999)


def test_prompts_are_recognised_and_written_in_another_template_of_their_task(words: Any) -> None:
    sides = {
        "country-capital": tasks.country_capital_conflicts(words, n_train=40, n_test=8),
        "indirect-object": tasks.indirect_object_identification(words, n_train=40, n_test=8, aligned=True),
    }
    for family, split in sides.items():
        for row, example in enumerate(split.train):
            assert family_of(example.prompt) == family
            assert tasks.conflict_kind(example) is None
            other = paraphrased(example.prompt, row)
            assert other is not None
            assert other != example.prompt
            assert family_of(other) == family
            names = [word for word in (example.correct.strip(), example.wrong.strip()) if word in example.prompt]
            assert all(name in other for name in names)
    coherent = next(e for e in tasks.knowledge_conflicts(words).train if tasks.conflict_kind(e) == "coherent")
    assert family_of(str(paraphrased(coherent.prompt))) == "knowledge-conflict, coherent"
    assert family_of("The capital of Norway is Oslo") is None
    assert paraphrased("Something else") is None


def test_the_command_line_evaluates_each_kind_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [text for templates in tasks.KNOWLEDGE_CONFLICT_TEMPLATES.values() for text in templates]
    folder = str(word_models.save_model(tmp_path / "model", [*word_models.TEXTS, *texts], context=128))
    words = ["fit", "--model", folder, "--task", "knowledge-conflict", "--n-train", "6", "--n-test", "6"]
    assert main([*words, "--steps", "1", "--one-direction", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["n_examples"] == 6
    assert {kind: one["n_examples"] for kind, one in found["kinds"].items()} == dict.fromkeys(tasks.CONFLICT_KINDS, 2)
    assert "By kind of conflict" in shown.err


def test_juice_scores_equally_many_examples_of_each_kind(words: Any) -> None:
    train, _ = tasks.knowledge_conflicts(words, n_train=72, n_test=3)
    assert Counter(map(tasks.conflict_kind, scored_examples(train, 12))) == dict.fromkeys(tasks.CONFLICT_KINDS, 4)
    other = tasks.country_capital_conflicts(words, n_train=40, n_test=8).train
    assert scored_examples(other, 12) == [other[index * 40 // 12] for index in range(12)]
    assert scored_examples(other, 40) == other
