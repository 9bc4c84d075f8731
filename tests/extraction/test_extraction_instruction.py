"""Instruction vectors against plain passes prompt by prompt, and the layer chosen against a choice made by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from extraction_cases import generated, inputs_of_layer, spaced_tokenizer
from model_zoo import tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.extraction import InstructionVectors, continuations, instruction_vectors
from actscale_fast.frozen.perplexity import perplexity

WHICH = pytest.mark.parametrize("which", [0, 1], ids=["llama", "gpt2"])
WITH = ["what is the capital A", "Paris is in one A", "Oslo A", "The answer of Rome in Berlin A"]
WITHOUT = ["what is the capital", "Paris is in one", "Oslo", "The answer of Rome in Berlin"]
PROMPTS = ["what is Madrid", "The capital of Oslo is", "B"]
SPANISH = {"el", "la", "los", "las", "de", "del", "que", "en", "es", "un", "una", "y", "por", "con", "para", "se"}
QUIET: dict[str, Any] = {"progress": False}


def tiny_models() -> list[Any]:
    """A Llama and a GPT-2 that know no more than the tokenizer's 27 words; the input of layer l + 1 is read by hand."""
    return [tiny_model("llama", num_hidden_layers=3, vocab_size=27), tiny_model("gpt2", n_layer=3, vocab_size=27)]


def made(model: Any, **options: Any) -> InstructionVectors:
    return instruction_vectors(model, spaced_tokenizer(), WITH, WITHOUT, **{**QUIET, **options})


def by_hand(model: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """(v, u, t) of the output of `layer`, one prompt at a time."""
    last = [
        torch.stack([inputs_of_layer(model, layer + 1, spaced_tokenizer()(text)["input_ids"])[-1] for text in texts])
        for texts in (WITH, WITHOUT)
    ]
    v = (last[0].double() - last[1].double()).mean(0)
    u = v / v.square().sum().sqrt()
    return v, u, (last[0].double() @ u).mean()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@WHICH
def test_vector_direction_and_target_are_the_means_of_the_last_tokens(which: int, batch_size: int) -> None:
    model = tiny_models()[which]
    found = made(model, batch_size=batch_size)
    assert found.location.layers == (0, 1, 2)
    for layer in (0, 1):
        v, u, t = by_hand(model, layer)
        torch.testing.assert_close(found.vectors[layer].double(), v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.directions[layer].double(), u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.norms[layer].double(), v.norm(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.targets[layer].double(), t, rtol=1e-4, atol=1e-5)


def greedy_by_hand(model: Any, ids: list[int], layer: int, mode: str, c: float, n_new: int) -> list[int]:
    """Greedy decoding without cache or padding; every token's state behind `layer` is set by the formula."""
    _, u, t = by_hand(model, layer)

    def edit(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = args[0]
        change = c * (t - h @ u)[..., None] * u if mode == "projection" else c * u
        return (h + change, *args[1:])

    block = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    made = list(ids)
    hook = block[layer + 1].register_forward_pre_hook(edit)
    for _ in range(n_new):
        with torch.no_grad():
            made.append(int(model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
    hook.remove()
    return made[len(ids) :]


@pytest.mark.parametrize("mode", ["projection", "add"])
@WHICH
def test_generation_with_cache_and_left_padding_is_that_of_a_loop_that_computes_everything_anew(
    which: int, mode: str
) -> None:
    model = tiny_models()[which].double()
    prompts, c = [[2, 4, 5, 6, 12, 7, 8], [2, 16, 17]], 1.5
    found = made(model)
    edit = found.projection(1) if mode == "projection" else found.add(1, 4 * c)
    strength = c if mode == "projection" else 1.0
    expected = [greedy_by_hand(model, ids, 1, mode, c if mode == "projection" else 4 * c, 8) for ids in prompts]
    plain = [greedy_by_hand(model, ids, 1, "add", 0.0, 8) for ids in prompts]
    with af.patch(model, edit, strength=strength):
        assert generated(model, prompts, 8) == expected
    assert generated(model, prompts, 8) == plain
    assert expected != plain


def test_the_projection_becomes_the_target_at_every_token() -> None:
    model = tiny_models()[0].double()
    found = made(model)
    with af.patch(model, found.projection(-2)):
        states = inputs_of_layer(model, 2, [2, 4, 5, 6, 7])
    at_target = states @ found.directions[1].double()
    torch.testing.assert_close(at_target, found.targets[1].double().expand(5), rtol=1e-5, atol=1e-5)


def test_equal_prompts_make_no_difference() -> None:
    model = tiny_models()[0]
    found = instruction_vectors(model, spaced_tokenizer(), WITH, WITH, batch_size=1, **QUIET)
    assert not found.vectors.any()
    ids = torch.tensor([[2, 4, 5]])
    for edit in (found.projection(1), found.add(1, 5.0)):
        with af.patch(model, edit):
            steered = model(ids).logits
        assert torch.equal(steered, model(ids).logits)


def test_both_forms_survive_saving(tmp_path: Any) -> None:
    model = tiny_models()[0]
    found, ids = made(model), torch.tensor([[2, 4, 5, 6]])
    for number, edit in enumerate((found.projection(1), found.add(1, 5.0))):
        edit.save_pretrained(tmp_path / str(number))
        with af.patch(model, edit):
            expected = model(ids).logits
        with af.patch(model, af.load_intervention(tmp_path / str(number))):
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def words(text: str) -> float:
    """A score that differs between layers: the share of different words."""
    return len(set(text.split())) / max(len(text.split()), 1)


@pytest.mark.parametrize("mode", ["projection", "add"])
def test_the_layer_chosen_is_the_best_of_a_plain_loop_over_layers(mode: Any) -> None:
    model, tokenizer = tiny_models()[0].double(), spaced_tokenizer()
    found = made(model)
    choice = found.choose_layer(
        model, tokenizer, PROMPTS, words, mode=mode, coefficient=1.5, max_new_tokens=6, batch_size=2, **QUIET
    )
    scores = []
    for layer, row in enumerate(choice.table):
        edit = found.projection(layer) if mode == "projection" else found.add(layer, 1.5)
        with af.patch(model, edit, strength=1.5 if mode == "projection" else 1.0):
            texts = [continuations(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
        scores.append(sum(map(words, texts)) / 3)
        assert (row.layer, row.continuations, row.kept) == (layer, texts, True)
        assert row.score == pytest.approx(scores[-1])
        if all(texts):
            by_hand = perplexity(model, tokenizer, texts, PROMPTS).median()
            assert row.perplexity == pytest.approx(float(by_hand), rel=1e-4)
    assert choice.layer == scores.index(max(scores))
    assert [single.location.layers for single in choice.intervention.singles] == [(choice.layer,)]


def test_layers_whose_texts_are_not_fluent_are_dropped() -> None:
    model, tokenizer = tiny_models()[0], spaced_tokenizer()
    found = made(model)
    options: dict[str, Any] = {"mode": "add", "coefficient": 20.0, "max_new_tokens": 6, **QUIET}
    table = found.choose_layer(model, tokenizer, PROMPTS, words, **options).table
    by_fluency = sorted(table, key=lambda row: row.perplexity)
    assert by_fluency[0].perplexity < by_fluency[1].perplexity
    limit = (by_fluency[0].perplexity + by_fluency[1].perplexity) / 2
    choice = found.choose_layer(model, tokenizer, PROMPTS, words, max_perplexity=limit, **options)
    assert choice.layer == by_fluency[0].layer
    assert [row.kept for row in choice.table] == [row.layer == choice.layer for row in table]
    with pytest.raises(ValueError, match=r"max_perplexity: got 1\.0, but the lowest of any layer is"):
        found.choose_layer(model, tokenizer, PROMPTS, words, max_perplexity=1.0, **options)


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model, tokenizer = tiny_models()[0], spaced_tokenizer()
    with pytest.raises(ValueError, match="without_instruction: got 1 prompts, expected one for each of the 2"):
        instruction_vectors(model, tokenizer, ["A", "B"], ["A"], **QUIET)
    with pytest.raises(TypeError, match="with_instruction: got str, expected a list of strings"):
        instruction_vectors(model, tokenizer, "A", ["A"], **QUIET)
    with pytest.raises(ValueError, match="row 1 of without_instruction: '' has no tokens"):
        instruction_vectors(model, spaced_tokenizer(opens=False), ["A"], [""], **QUIET)
    few = made(model, layers=[1])
    with pytest.raises(ValueError, match=r"layer: got 0, expected one of \[1\], which have a vector"):
        few.add(0, 1.0)
    with pytest.raises(ValueError, match="coefficient: got inf, expected a finite number"):
        few.add(1, math.inf)
    with pytest.raises(ValueError, match="mode: got 'set', expected 'projection' or 'add'"):
        few.choose_layer(model, tokenizer, PROMPTS, words, mode="set", **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score: got \[nan, nan, nan\] at layer 1, expected finite numbers"):
        few.choose_layer(model, tokenizer, PROMPTS, lambda text: math.nan, max_new_tokens=2, **QUIET)
    with pytest.raises(ValueError, match="made for another model"):
        few.choose_layer(tiny_models()[1], tokenizer, PROMPTS, words, max_new_tokens=2, **QUIET)


@pytest.mark.real_model
def test_the_real_model_answers_in_spanish_without_being_asked(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model

    def chat(text: str) -> str:
        message = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def spanish(text: str) -> float:
        found = re.findall(r"[^\W\d_]+", text.lower())
        return sum(word in SPANISH for word in found) / 24

    asked = ["What is the capital of Italy?", "How do birds fly?", "Name a popular sport.", "What is a good breakfast?",
             "Why is the sky blue?", "Tell me about the moon.", "What do cats eat?", "Who wrote Hamlet?"]  # fmt: skip
    prompts = [chat(text) for text in ("What is the largest ocean?", "How do I boil an egg?", "Describe a dog.")]
    found = instruction_vectors(
        model,
        tokenizer,
        [chat(f"{text} Answer in Spanish.") for text in asked],
        [chat(text) for text in asked],
        **QUIET,
    )
    choice = found.choose_layer(
        model, tokenizer, prompts, spanish, layers=[10, 19, 23], max_new_tokens=24, max_perplexity=30, **QUIET
    )
    plain = [spanish(text) for text in continuations(model, tokenizer, prompts, max_new_tokens=24)]
    best = next(row for row in choice.table if row.layer == choice.layer)
    print(choice.layer, best.score, plain, best.continuations)
    assert best.score > 0.1 + sum(plain) / 3
