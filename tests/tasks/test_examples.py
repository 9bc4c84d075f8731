"""Examples, their files, and their encoding: what is refused, with which words, and what a batch holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import actscale_fast as af
from actscale_fast.frozen.batching import next_token_logits
from actscale_fast.learning.encoded_examples import EncodedExamples

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
        ("[1]", r"row 2 of .*examples.jsonl: got 1 values, expected \(prompt, correct, wrong\)"),
        ('{"prompt": "p", "correct": "c"}', "row 2 of .*examples.jsonl has no column 'wrong'; it has 'prompt', 'corr"),
        ('{"prompt": "p", "correct": "c", "wrong": "c"}', "row 2 of .*s.jsonl: wrong: got 'c', the same as correct"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": "p", "correct": "c", "wrong": "w"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        af.load_examples(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: got none, expected at least one example"):
        af.load_examples(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            af.Example("The capital", " Paris Berlin", " Paris"),
            "row 2 of examples: the tokens of correct ' Paris Berlin' begin with all those of wrong ' Paris'",
        ),
        (
            af.Example("The capital", " nowhere", " elsewhere"),
            "row 2 of examples, correct: ' nowhere' is not a token of the tokenizer",
        ),
        (af.Example("The capital", " Rome", "  Rome"), "row 2 of examples: correct ' Rome' and wrong '  Rome' are one"),
        (
            af.Example(" ".join(["The"] * 65), " Paris", " Rome"),
            "row 2 of examples has 65 tokens, expected at most the model's 64",
        ),
    ],
)
def test_what_a_model_cannot_answer_is_refused_by_row(example: af.Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodedExamples([GOOD, example], tiny.tokenizer(), tiny.llama())


def test_wrong_kinds_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples: got none"):
        EncodedExamples([], tiny.tokenizer(), tiny.llama())
    with pytest.raises(TypeError, match="row 1 of examples: got str, expected an Example"):
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


@torch.no_grad()
def test_padded_prompts_have_the_same_logits_inside_wrappers() -> None:
    model = tiny.llama()
    prompts = ["The capital of A is", "is"]
    data = EncodedExamples([af.Example(p, " Paris", " Rome") for p in prompts], tiny.tokenizer(), model)
    expected = next_token_logits(model, data.batch([0, 1]))

    class Peft(torch.nn.Module):
        """PEFT's outside: forward(*args, **kwargs), and the way in."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def get_base_model(self) -> torch.nn.Module:
            return self.inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    for wrapped in (torch.compile(model, backend="eager"), Peft()):
        logits = next_token_logits(wrapped, data.batch([0, 1]))  # type: ignore[arg-type]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_special_tokens_that_close_a_text_are_not_part_of_a_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    closing = tiny.tokenizer()
    plain = EncodedExamples([GOOD], closing, tiny.llama())
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    assert closing(GOOD.prompt)["input_ids"][-1] == 3
    data = EncodedExamples([GOOD, af.Example("The </s>", " Paris", " Rome")], closing, tiny.llama())
    assert data.prompts == [[2, *plain.prompts[0]], [2, 4, 3]]
    assert data.correct.tolist() == [*plain.correct.tolist()] * 2


def test_an_unknown_word_is_an_answer_only_where_it_is_meant() -> None:
    data = EncodedExamples([af.Example("The capital", " <unk>", " Rome")], tiny.tokenizer(), tiny.llama())
    assert data.correct.tolist() == [0]


def test_a_tokenizer_of_another_model_is_refused_by_row() -> None:
    model = tiny.llama()
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="row 2 of examples has token id 25, expected less than the model's 20"):
        EncodedExamples([GOOD, af.Example("six", " Paris", " Rome")], tiny.tokenizer(), model)


def test_what_is_no_model_or_tokenizer_is_refused_by_name() -> None:
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model)
    for run in (af.fit, af.evaluate):
        with pytest.raises(TypeError, match="model: got Linear, expected a Hugging Face model"):
            run(torch.nn.Linear(2, 2), tiny.tokenizer(), [GOOD], scalars)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="tokenizer: got NoneType, expected a Hugging Face tokenizer"):
            run(model, None, [GOOD], scalars)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="intervention: got NoneType, expected an Intervention"):
            run(model, tiny.tokenizer(), [GOOD], None)  # type: ignore[arg-type]


def test_the_context_of_mpt_counts() -> None:
    from model_zoo import tiny_model

    with pytest.raises(ValueError, match="row 1 of examples has 65 tokens, expected at most the model's 64"):
        EncodedExamples([af.Example(" ".join(["The"] * 65), " Paris", " Rome")], tiny.tokenizer(), tiny_model("mpt"))


def test_files_may_open_with_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    line = json.dumps({"prompt": "Größe\u2028 is", "correct": " c", "wrong": " w"}, ensure_ascii=False)
    path.write_text(line, encoding="utf-8-sig")
    assert af.load_examples(path) == [af.Example("Größe\u2028 is", " c", " w")]
    path.write_text(line.replace("\u2028", ""), encoding="latin-1")
    with pytest.raises(ValueError, match=r"examples\.jsonl: not UTF-8"):
        af.load_examples(path)


def test_batches_by_length_hold_every_row_once() -> None:
    prompts = ["one two three", "one", "one two", "one two three four"]
    data = EncodedExamples([af.Example(p, " Paris", " Rome") for p in prompts], tiny.tokenizer(), tiny.llama())
    assert data.by_length(2) == [[1, 2], [0, 3]]
    assert not data.batch([1]).padded
    assert data.batch([0, 1]).padded
