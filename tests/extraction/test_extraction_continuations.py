"""Greedy continuations: batched and padded as one by one, under the caller's patch, whatever a model's own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extraction_cases import greedy_by_hand, spaced_tokenizer
from frozen_cases import state_of
from model_zoo import tiny_model

import actscale_fast as af
from actscale_fast.extraction import continuations
from actscale_fast.extraction.continuations import start_id
from actscale_fast.interventions import SteerVec

PROMPTS = ["what is Madrid", "The capital of Oslo is in one", "B", "Paris is A"]


def by_hand(model: Any, z: torch.Tensor | None, n_new: int) -> list[str]:
    tokenizer, texts = spaced_tokenizer(), []
    for prompt in PROMPTS:
        ids = greedy_by_hand(model, tokenizer(prompt)["input_ids"], 1, lambda column: z, n_new)
        end = next((i for i, token in enumerate(ids) if token in (2, 3)), n_new)  # 2 ends a text for the model
        texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_say_what_each_prompt_gives_alone(family: str, batch_size: int) -> None:
    layers = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    model = tiny_model(family, vocab_size=27, **layers)
    vector = SteerVec.for_model(model, "residual", [0])
    with torch.no_grad():
        vector.vectors.copy_(2 * torch.randn(vector.vectors.shape, generator=torch.Generator().manual_seed(1)))
    expected, plain = by_hand(model, vector.vectors.detach()[0, 0, 0], 6), by_hand(model, None, 6)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.min_new_tokens = 6
    before = state_of(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": batch_size}
    with af.patch(model, vector):
        assert continuations(model, spaced_tokenizer(), PROMPTS, **options) == expected
    assert continuations(model, spaced_tokenizer(), PROMPTS, **options) == plain
    assert state_of(model) == before
    assert expected != plain


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model, tokenizer = tiny_model(), spaced_tokenizer(opens=False)
    with pytest.raises(TypeError, match="prompts: got str, expected a list of strings"):
        continuations(model, tokenizer, "Paris", max_new_tokens=1)
    with pytest.raises(ValueError, match="row 2 of prompts: '' has no tokens"):
        continuations(model, tokenizer, ["Paris", ""], max_new_tokens=1)
    with pytest.raises(ValueError, match="row 1 of prompts has 65 tokens, expected at most the model's 64"):
        continuations(model, tokenizer, ["Paris " * 65], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens: got 0, expected a positive integer"):
        continuations(model, tokenizer, ["Paris"], max_new_tokens=0)


def test_generation_starts_from_what_the_tokenizer_has() -> None:
    tokenizer = spaced_tokenizer()
    assert start_id(tokenizer) == 2
    tokenizer.bos_token = None
    assert start_id(tokenizer) == 3
    tokenizer.eos_token = None
    assert start_id(tokenizer) == 1
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: it has no BOS, EOS or padding token"):
        start_id(tokenizer)
