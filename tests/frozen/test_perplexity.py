"""Perplexity is what a loop over the tokens, one text at a time, says it is."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import tiny
import torch

from actscale_fast.frozen.perplexity import perplexity
from actscale_fast.interventions import ActivScalar
from actscale_fast.patching.patch import patch

TEXTS = ["Paris is in", "one two three four five six", "A Q", "The capital of Rome is Rome", "Oslo Oslo Oslo"]
PROMPTS = ["The capital of", "Q what is the", "A", "", "six five four three two one"]


def by_loop(model: Any, tokenizer: Any, text: str, prompt: str = "") -> float:
    """One token at a time: the definition."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = before + tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for place in range(max(len(before), 1), len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[place]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny.llama()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_it_is_what_a_loop_over_the_tokens_gives(
    model: Any, tokenizer: Any, prompts: list[str] | None, batch_size: int
) -> None:
    expected = [by_loop(model, tokenizer, *pair) for pair in zip(TEXTS, prompts or [""] * 5, strict=True)]
    found = perplexity(model, tokenizer, TEXTS, prompts, batch_size=batch_size)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_size_of_a_chunk_of_logits_changes_nothing(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, tokenizer, TEXTS)
    for size in (1, 4 * len(tiny.WORDS), 12 * len(tiny.WORDS)):
        with monkeypatch.context() as small:
            small.setattr(sys.modules["actscale_fast.frozen.perplexity"], "_CHUNK_BYTES", size)
            torch.testing.assert_close(perplexity(model, tokenizer, TEXTS), whole, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_head_that_is_no_plain_product_is_called_as_it_is(model: Any, tokenizer: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected = [by_loop(model, tokenizer, *pair) for pair in zip(TEXTS, PROMPTS, strict=True)]
    found = perplexity(model, tokenizer, TEXTS, PROMPTS, batch_size=2)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_special_token_that_opens_a_text_predicts_its_first_token(model: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    opening = tiny.tokenizer()
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    plain = tiny.tokenizer()
    found = perplexity(model, opening, ["Paris", "Rome is"])
    expected = [by_loop(model, plain, text, "<s>") for text in ("Paris", "Rome is")]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    behind = perplexity(model, opening, ["Rome is"], ["A Q"])
    torch.testing.assert_close(behind, torch.tensor([by_loop(model, plain, "Rome is", "<s> A Q")]), rtol=1e-5, atol=0)


@torch.no_grad()
def test_inside_a_patch_the_intervened_model_judges_and_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    intervention = ActivScalar.for_model(model)
    intervention.alpha.fill_(0.5)
    model.train()
    model.lm_head.weight.requires_grad_(True)
    before = perplexity(model, tokenizer, TEXTS)
    with patch(model, intervention):
        inside = perplexity(model, tokenizer, TEXTS)
        model.eval()
        expected = torch.tensor([by_loop(model, tokenizer, text) for text in TEXTS])
        model.train()
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=0)
    assert not torch.allclose(inside, before, rtol=1e-3)
    assert torch.equal(perplexity(model, tokenizer, TEXTS), before)
    assert model.training
    assert model.lm_head.weight.requires_grad


def test_no_texts_have_no_perplexities(model: Any, tokenizer: Any) -> None:
    assert perplexity(model, tokenizer, []).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": ["A Q", ""]}, ValueError, "row 2 of texts: '' has no tokens"),
        ({"texts": ["A Q", "A"]}, ValueError, "row 2 of texts: 'A' is one token, which nothing predicts"),
        ({"texts": "A Q"}, TypeError, "texts: got str, expected a list of strings"),
        ({"texts": ["A Q", None]}, TypeError, "row 2 of texts: got NoneType, expected a string"),
        ({"texts": ["A"], "prompts": [3]}, TypeError, "row 1 of prompts: got int, expected a string"),
        ({"texts": ["A"], "prompts": []}, ValueError, "prompts: got 0, expected one for each of the 1 texts"),
        ({"texts": ["A " * 65]}, ValueError, "row 1 of texts has 65 tokens, expected at most the model's 64"),
        ({"texts": ["A Q"], "batch_size": 0}, ValueError, "batch_size: got 0"),
    ],
)
def test_what_cannot_be_scored_is_named(
    model: Any, tokenizer: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        perplexity(model, tokenizer, **arguments)


def test_tokens_of_another_models_tokenizer_are_refused(model: Any, tokenizer: Any) -> None:
    tokenizer_of_more = tiny.tokenizer()
    tokenizer_of_more.add_tokens(["Lima"])
    with pytest.raises(ValueError, match="row 1 of texts has token id 26, expected less than the model's 26"):
        perplexity(model, tokenizer_of_more, ["Lima is"])


@pytest.mark.real_model
def test_the_real_model_finds_a_sentence_likelier_than_its_words_in_disorder(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    sense, nonsense = perplexity(
        model, tokenizer, [" a small house by the sea.", " sea a by small the house."], ["I live in"] * 2
    )
    assert 1 < sense < 60
    assert nonsense > 10 * sense
    alone = by_loop(model, tokenizer, " a small house by the sea.", "I live in")
    assert sense.item() == pytest.approx(alone, rel=1e-3)
