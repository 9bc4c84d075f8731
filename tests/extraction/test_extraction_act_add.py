"""ActAdd against hooks written by hand: which vectors, at which tokens, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extraction_cases import generated, greedy_by_hand, inputs_of_layer, models, spaced_tokenizer
from model_zoo import tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.extraction import act_add

MODELS = pytest.mark.parametrize("which", [0, 1], ids=["llama", "gpt2"])
OPENS = pytest.mark.parametrize("opens", [True, False], ids=["opened", "bare"])


def by_hand(model: Any, tokenizer: Any, positive: list[str], negative: list[str], layer: int, opens: bool) -> Tensor:
    """h⁺ − h⁻ [n, d], of words that the test itself has padded."""
    ids = [tokenizer.convert_tokens_to_ids([*(["<s>"] if opens else []), *words]) for words in (positive, negative)]
    return inputs_of_layer(model, layer, ids[0]) - inputs_of_layer(model, layer, ids[1])


@OPENS
@MODELS
def test_the_vectors_are_the_difference_of_the_layers_inputs(which: int, opens: bool) -> None:
    model, tokenizer = models()[which], spaced_tokenizer(opens=opens)
    vector = act_add(model, tokenizer, "Paris in Rome", "Oslo", layer=2, coefficient=4.0)
    expected = 4.0 * by_hand(model, tokenizer, ["Paris", "in", "Rome"], ["Oslo", "_", "_"], 2, opens)
    assert (vector.location.site, vector.location.layers) == ("residual", (1,))
    assert vector.location.positions == tuple(range(3 + opens))
    assert not vector.location.generated
    torch.testing.assert_close(vector.vectors[0, :, 0], expected, rtol=1e-4, atol=1e-5)
    if opens:
        torch.testing.assert_close(vector.vectors[0, 0, 0], torch.zeros(32), rtol=0, atol=1e-5)


@OPENS
@MODELS
def test_an_empty_negative_prompt_is_padding_alone(which: int, opens: bool) -> None:
    model, tokenizer = models()[which], spaced_tokenizer(opens=opens)
    vector = act_add(model, tokenizer, "Paris in", layer=-1)
    expected = by_hand(model, tokenizer, ["Paris", "in"], ["_", "_"], 2, opens)
    torch.testing.assert_close(vector.vectors[0, :, 0], expected, rtol=1e-4, atol=1e-5)


@MODELS
def test_generation_with_cache_and_left_padding_is_that_of_a_loop_that_computes_everything_anew(which: int) -> None:
    model, tokenizer = models()[which].double(), spaced_tokenizer()
    vector = act_add(model, tokenizer, "Paris in Rome", "Oslo", layer=1, coefficient=6.0)
    difference = 6.0 * by_hand(model, tokenizer, ["Paris", "in", "Rome"], ["Oslo", "_", "_"], 1, True)
    prompts = [[2, 4, 5, 6, 12, 7, 8], [2, 16, 17], [2, 20, 21, 22, 23]]
    expected, plain = [], []
    for ids in prompts:
        added = lambda column, ids=ids: difference[column] if column < min(4, len(ids)) else None  # noqa: E731
        expected.append(greedy_by_hand(model, ids, 1, added, 8))
        plain.append(greedy_by_hand(model, ids, 1, lambda column: None, 8))
    with af.patch(model, vector):
        assert generated(model, prompts, 8) == expected
    assert generated(model, prompts, 8) == plain
    assert expected != plain


@MODELS
def test_swapping_the_prompts_or_the_sign_negates_it(which: int) -> None:
    model, tokenizer = models()[which], spaced_tokenizer()
    one = act_add(model, tokenizer, "Paris", "Oslo in", layer=2, coefficient=3.0)
    swapped = act_add(model, tokenizer, "Oslo in", "Paris", layer=2, coefficient=3.0)
    negated = act_add(model, tokenizer, "Paris", "Oslo in", layer=2, coefficient=-3.0)
    torch.testing.assert_close(swapped.vectors, -one.vectors, rtol=1e-5, atol=1e-5)
    assert torch.equal(negated.vectors, -one.vectors)


def test_coefficient_zero_is_the_identity() -> None:
    model = models()[0]
    ids = torch.tensor([[2, 4, 5, 6]])
    with af.patch(model, act_add(model, spaced_tokenizer(), "Paris", "Oslo", layer=2, coefficient=0)):
        steered = model(ids).logits
    assert torch.equal(steered, model(ids).logits)


def test_it_survives_saving_and_pairs_add_up(tmp_path: Any) -> None:
    model, tokenizer = models()[0].double(), spaced_tokenizer()
    one = act_add(model, tokenizer, "Paris", "Oslo in Rome", layer=1)
    two = act_add(model, tokenizer, "Berlin of", "Madrid", layer=2)
    (one + two).save_pretrained(tmp_path)
    ids = torch.tensor([[2, 4, 5, 6, 7]])
    with af.patch(model, one), af.patch(model, two):
        nested = model(ids).logits
    with af.patch(model, af.load_intervention(tmp_path)):
        torch.testing.assert_close(model(ids).logits, nested, rtol=1e-12, atol=1e-12)


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    for layer in (0, -3):
        with pytest.raises(ValueError, match="whose input is the embedding's output, which is not a site"):
            act_add(model, tokenizer, "Paris", layer=layer)
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 1 to 2 or -2 to -1"):
            act_add(model, tokenizer, "Paris", layer=layer)
    with pytest.raises(TypeError, match=r"layer: got 1\.5, expected an int"):
        act_add(model, tokenizer, "Paris", layer=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficient: got nan"):
        act_add(model, tokenizer, "Paris", layer=1, coefficient=float("nan"))
    with pytest.raises(TypeError, match="positive: got list, expected a string"):
        act_add(model, tokenizer, ["Paris"], layer=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding: 'of in' is 2 tokens, expected one"):
        act_add(model, tokenizer, "Paris", layer=1, padding="of in")
    with pytest.raises(ValueError, match="positive, negative: got '' and '', which have no tokens"):
        act_add(model, spaced_tokenizer(opens=False), "", layer=1)
    with pytest.raises(ValueError, match="positive has token id 11, expected less than the model's 5"):
        act_add(tiny_model("llama", vocab_size=5), tokenizer, "Paris", layer=1)
    with pytest.raises(ValueError, match="has 65 tokens, expected at most the model's 64"):
        act_add(model, tokenizer, "Paris " * 64, layer=1)


def test_no_padding_is_needed_for_prompts_of_one_length() -> None:
    assert act_add(models()[0], spaced_tokenizer(), "Paris", "Oslo", layer=1, padding="of in").n_active


@pytest.mark.real_model
def test_love_instead_of_hate_changes_what_the_real_model_says_to_something_kinder(demo_model: tuple[Any, Any]) -> None:
    from actscale_fast.extraction import continuations
    from actscale_fast.frozen.perplexity import perplexity

    model, tokenizer = demo_model
    prompt = ["I hate you because"]
    plain = continuations(model, tokenizer, prompt, max_new_tokens=16)
    with af.patch(model, act_add(model, tokenizer, "Love", "Hate", layer=6, coefficient=5)):
        steered = continuations(model, tokenizer, prompt, max_new_tokens=16)
    assert "hero" in steered[0] or "glad" in steered[0]
    assert steered != plain
    assert float(perplexity(model, tokenizer, steered, prompt)) < 10


def test_every_family_takes_it() -> None:
    tokenizer = spaced_tokenizer()
    for family in ("opt", "gpt_neox", "bloom", "gemma2", "falcon"):
        model = tiny_model(family)
        with af.patch(model, act_add(model, tokenizer, "Paris in", "Oslo", layer=1)):
            assert not torch.equal(
                model(torch.tensor([[2, 4, 5]])).logits, tiny_model(family)(torch.tensor([[2, 4, 5]])).logits
            )
