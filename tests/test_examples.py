"""Examples, their files, and their encoding: what is refused, with which words, and what a batch holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

import actscale_fast as af
from actscale_fast.learning.encoding import EncodedExamples, next_token_logits

GOOD = af.Example("The capital of A is", " Paris", " Berlin")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("", " a", " b"), "prompt: got '', expected text"),
        (("p", " ", " b"), "correct: got ' ', expected text"),
        (("p", " a", " a"), "wrong: got ' a', the same as correct"),
    ],
)
def test_an_example_refuses_empty_texts_and_equal_answers(fields: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        af.Example(*fields)
    with pytest.raises(TypeError, match="wrong: got int, expected a string"):
        af.Example("p", " a", 3)  # type: ignore[arg-type]


def test_examples_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "examples.jsonl"
    examples = [GOOD, af.Example("Größe – „ß“ is", " x", " y")]
    af.save_examples(path, examples)
    assert af.load_examples(path) == examples
    assert [entry.name for entry in path.parent.iterdir()] == ["examples.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: got list, expected the keys"),
        ('{"prompt": "p", "correct": "c"}', r"line 2: got \['correct', 'prompt'\]"),
        ('{"prompt": "p", "correct": "c", "wrong": "c"}', "line 2: wrong: got 'c', the same as correct"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": "p", "correct": "c", "wrong": "w"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        af.load_examples(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="got no examples"):
        af.load_examples(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            af.Example("The capital", " Paris Berlin", " Rome"),
            r"row 1, correct: ' Paris Berlin' is 2 tokens \['Paris', 'B",
        ),
        (
            af.Example("The capital", " nowhere", " elsewhere"),
            "row 1: correct ' nowhere' and wrong ' elsewhere' are one",
        ),
        (af.Example(" ".join(["The"] * 65), " Paris", " Rome"), "row 1 has 65 tokens, expected at most the model's 64"),
    ],
)
def test_what_a_model_cannot_answer_is_refused_by_row(example: af.Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodedExamples([GOOD, example], tiny.tokenizer(), tiny.llama())


def test_wrong_kinds_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples: got none"):
        EncodedExamples([], tiny.tokenizer(), tiny.llama())
    with pytest.raises(TypeError, match="examples: row 0 is a str, expected an Example"):
        EncodedExamples(["text"], tiny.tokenizer(), tiny.llama())  # type: ignore[list-item]


@torch.no_grad()
def test_padded_prompts_have_the_logits_that_each_has_alone() -> None:
    model, prompts = tiny.llama(), ["The capital of A is", "is", "Q what is the capital of B answer", "one two"]
    data = EncodedExamples([af.Example(p, " Paris", " Rome") for p in prompts], tiny.tokenizer(), model)
    together = next_token_logits(model, data.batch(range(4)))
    alone = torch.cat([next_token_logits(model, data.batch([row])) for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    full = model(input_ids=torch.tensor([data.prompts[2]])).logits[:, -1]
    torch.testing.assert_close(together[2:3], full, rtol=1e-5, atol=1e-5)


def test_batches_by_length_hold_every_row_once() -> None:
    prompts = ["one two three", "one", "one two", "one two three four"]
    data = EncodedExamples([af.Example(p, " Paris", " Rome") for p in prompts], tiny.tokenizer(), tiny.llama())
    assert data.by_length(2) == [[1, 2], [0, 3]]
    assert not data.batch([1]).padded
    assert data.batch([0, 1]).padded
