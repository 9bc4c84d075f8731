"""Latent vectors: the frozen model says the sentence, by plain greedy loops of the test's own too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extraction_cases import greedy_by_hand, models, spaced_tokenizer
from frozen_cases import state_of
from model_zoo import tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.extraction import LatentResult, decode_latent, latent_vectors, mean_vector
from actscale_fast.extraction.latent_search import LatentSearch
from actscale_fast.frozen.encoder import TextEncoder
from actscale_fast.interventions import SteerVec
from actscale_fast.modules.evaluation_mode import evaluation_mode

WHERE = pytest.mark.parametrize("which", [0, 1], ids=["llama", "gpt2"])
EVERY = pytest.mark.parametrize("every_step", [True, False], ids=["every step", "first step"])
#: Ten sentences of ten tokens each, on which no setting was chosen.
UNSEEN = [
    "The farmer counted his sheep under the evening sky.",
    "My sister painted the kitchen door a bright green.",
    "A letter arrived from the bank late on Friday.",
    "We watched the rain fall on the empty street.",
    "The teacher smiled and closed the heavy blue book.",
    "He carried the broken clock to the village shop.",
    "Three tired soldiers slept beside the old stone bridge.",
    "She never tells anyone where she hides the keys.",
    "The train to the coast leaves at seven tomorrow.",
    "Cold wind blew through the cracks in the wall.",
]


def solved(model: Any, sentences: list[str], **options: Any) -> LatentResult:
    settings = {"layer": 0, "start": "A", "steps": 60, "progress": False}
    return latent_vectors(model, spaced_tokenizer(), sentences, **{**settings, **options})


def tiny_models() -> list[Any]:
    """A Llama and a GPT-2 that know no more than the tokenizer's 27 words."""
    return [tiny_model("llama", num_hidden_layers=3, vocab_size=27), tiny_model("gpt2", n_layer=3, vocab_size=27)]


def sayable(model: Any, count: int, every_step: bool = True) -> list[str]:
    """Texts of three words that the random model says under some vector: not every text has one."""
    tokenizer, texts, generator = spaced_tokenizer(), dict[str, None](), torch.Generator().manual_seed(1)
    size = model.get_input_embeddings().weight.detach().square().mean().sqrt()
    for _ in range(40):
        z = 4 * size * torch.randn(32, generator=generator)
        ids = greedy_by_hand(model, [2, 8], 1, lambda column, z=z: z if every_step or column == 1 else None, 3)
        if min(ids) > 3:
            texts[tokenizer.decode(ids)] = None
    assert len(texts) >= count
    return list(texts)[:count]


def searched(model: Any, every_step: bool, rows: list[list[int]]) -> LatentSearch:
    positions = None if every_step else [1]
    location = SteerVec.for_model(model, "residual", [0], positions).location
    return LatentSearch(layout(model), location, [2, 8], rows, TextEncoder(layout(model), spaced_tokenizer()))


def loss_by_hand(model: Any, z: Tensor, ids: list[int], every_step: bool) -> Tensor:
    """Mean −log p of `ids` behind [2, 8], by a hook that adds z to the input of layer 1."""

    def add(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.ones(args[0].shape[1]) if every_step else torch.arange(args[0].shape[1]) == 1
        return (args[0] + rows[:, None] * z, *args[1:])

    block = model.transformer.h[1] if model.config.model_type == "gpt2" else model.model.layers[1]
    hook = block.register_forward_pre_hook(add)
    logits = model(torch.tensor([[2, 8, *ids[:-1]]])).logits[0, 1:]
    hook.remove()
    return -logits.log_softmax(-1)[range(len(ids)), ids].mean()


@EVERY
@WHERE
def test_the_loss_and_its_gradient_are_those_of_plain_teacher_forcing(which: int, every_step: bool) -> None:
    model = models()[which].double()
    rows = [[4, 5, 6, 3], [12, 13, 3], [7, 7, 9, 11, 10, 3]]
    with evaluation_mode(model), searched(model, every_step, rows) as search:
        search.start(0.7, torch.Generator().manual_seed(3))
        losses, _ = search._losses(torch.tensor([2, 0, 1]))
        (gradient,) = torch.autograd.grad(losses.sum(), search.z.vectors)
        values = search.z.vectors.detach()
    for place, row in enumerate([2, 0, 1]):
        z = values[row, 0, 0, 0].double().requires_grad_()
        expected = loss_by_hand(model, z, rows[row], every_step)
        expected.backward()
        torch.testing.assert_close(losses[place].double(), expected, rtol=1e-5, atol=1e-6)
        assert z.grad is not None
        torch.testing.assert_close(gradient[row, 0, 0, 0].double(), z.grad, rtol=1e-4, atol=1e-6)


@EVERY
@WHERE
def test_a_plain_greedy_loop_under_the_vector_says_the_sentence(which: int, every_step: bool) -> None:
    model, tokenizer = tiny_models()[which], spaced_tokenizer()
    sentences = sayable(model, 4, every_step)
    result = solved(model, sentences, every_step=every_step, ends=False, restarts=6)
    assert sum(result.exact) >= 2
    for sentence, vector, exact in zip(sentences, result.vectors, result.exact, strict=True):
        z = vector.vectors.detach()[0, 0, 0]
        wanted = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        added = lambda column, z=z: z if every_step or column == 1 else None  # noqa: E731
        assert (greedy_by_hand(model, [2, 8], 1, added, len(wanted)) == wanted) is exact
        assert (decode_latent(model, tokenizer, vector, len(wanted), start="A") == sentence) is exact


def test_a_sentence_that_ends_makes_decoding_stop() -> None:
    model, tokenizer = tiny_models()[0], spaced_tokenizer()
    result = solved(model, ["Paris", "Oslo", "Rome", "Berlin"])
    assert any(result.exact)
    for sentence, vector, exact in zip(result.sentences, result.vectors, result.exact, strict=True):
        assert (decode_latent(model, tokenizer, vector, 20, start="A") == sentence) is exact


def test_the_result_tells_the_loss_at_the_vector_and_the_steps() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    result = solved(model, ["The capital of Rome"], steps=20)
    ids = tokenizer("The capital of Rome", add_special_tokens=False)["input_ids"] + [3]
    by_hand = loss_by_hand(model, result.vectors[0].vectors.detach()[0, 0, 0], ids, True).item()
    assert result.losses[0] == pytest.approx(by_hand, rel=1e-4)
    assert 0 < result.steps[0] <= 60
    assert result.sentences == ["The capital of Rome"]


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    model = tiny_models()[0].double()
    rows = [[4, 5, 6, 3], [12, 13, 3], [7, 7, 9, 11, 10, 3]]
    with torch.enable_grad(), evaluation_mode(model), searched(model, True, rows) as search:
        search.start(0.7, torch.Generator().manual_seed(3))
        every = search._losses(torch.tensor([0, 1, 2]))[0].tolist()
        some = search._losses(torch.tensor([1]))[0].tolist()
    assert some == pytest.approx(every[1:2], rel=1e-6)


def test_sentences_come_back_in_order_whatever_the_batches() -> None:
    model = tiny_models()[0]
    sentences = ["Rome is in A", *sayable(model, 2), "Oslo"]
    result = solved(model, sentences, steps=20, restarts=0, batch_size=2)
    assert result.sentences == sentences
    for sentence, vector, loss in zip(sentences, result.vectors, result.losses, strict=True):
        ids = spaced_tokenizer()(sentence, add_special_tokens=False)["input_ids"] + [3]
        by_hand = loss_by_hand(model, vector.vectors.detach()[0, 0, 0], ids, True).item()
        assert loss == pytest.approx(by_hand, rel=1e-4)


def test_a_sentence_out_of_reach_is_reported_with_its_best_vector() -> None:
    model = models()[0]
    result = solved(model, ["Paris Oslo Rome Berlin Madrid one two three four five six"], steps=2, restarts=1, layer=1)
    assert result.exact == [False]
    assert result.steps == [4]
    zero = SteerVec(result.vectors[0].location)
    ids = spaced_tokenizer()(result.sentences[0], add_special_tokens=False)["input_ids"] + [3]
    assert result.losses[0] <= loss_by_hand(model, zero.vectors.detach()[0, 0, 0], ids, True).item() + 1e-4


def test_two_runs_agree_to_the_bit() -> None:
    model = models()[0]
    one, two = (solved(model, ["Oslo is in Madrid", "one"], steps=5, restarts=1) for _ in range(2))
    for a, b in zip(one.vectors, two.vectors, strict=True):
        assert torch.equal(a.vectors, b.vectors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "falcon"])
def test_every_family_is_left_as_it_was_and_says_it(family: str) -> None:
    options = {"num_hidden_layers": 3} if family != "gpt2" else {"n_layer": 3}
    model = tiny_model(family, vocab_size=27, **options).train()
    before = state_of(model)
    result = solved(model, ["Paris", "Oslo", "Rome", "Berlin"], ends=False)
    assert state_of(model) == before
    assert sum(result.exact) >= 2


def test_a_vector_survives_saving(tmp_path: Any) -> None:
    model, tokenizer = tiny_models()[0], spaced_tokenizer()
    vector = solved(model, ["Oslo is in Madrid"], steps=5, restarts=0).vectors[0]
    vector.save_pretrained(tmp_path)
    before = decode_latent(model, tokenizer, vector, 8, start="A")
    assert decode_latent(model, tokenizer, af.load_intervention(tmp_path), 8, start="A") == before
    assert decode_latent(model, tokenizer, vector, 8, start="A", strength=0.0) != before


def test_arithmetic_moves_a_vector_between_two_sets() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    z, one, two = solved(model, ["Oslo is in Madrid", "one two", "three four"], steps=5, restarts=0).vectors
    moved = z + 0.5 * (mean_vector([one, two]) - mean_vector([z, two]))
    by_hand = z.vectors + 0.5 * ((one.vectors + two.vectors) / 2 - (z.vectors + two.vectors) / 2)
    assert type(moved) is SteerVec
    torch.testing.assert_close(moved.vectors, by_hand, rtol=1e-5, atol=1e-6)
    assert isinstance(decode_latent(model, tokenizer, moved, 4, start="A"), str)
    with pytest.raises(TypeError, match="vectors: got \\[\\], expected at least one SteerVec"):
        mean_vector([])
    with pytest.raises(ValueError, match="their layers, positions or models differ"):
        mean_vector([z, SteerVec.for_model(model, "residual", [1])])


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model = models()[0]
    for options, error, message in (
        ({"layer": 3}, ValueError, "layers: got 3, expected -3 to 2"),
        ({"lr": 0.0}, ValueError, "lr: got 0.0, expected a positive number"),
        ({"steps": 0}, ValueError, "steps: got 0, expected a positive integer"),
        ({"restarts": -1}, ValueError, "restarts: got -1, expected an integer that is at least 0"),
    ):
        with pytest.raises(error, match=message):
            solved(model, ["Paris"], **options)
    with pytest.raises(ValueError, match="sentences: got none, expected at least one"):
        solved(model, [])
    with pytest.raises(TypeError, match="sentences: got str, expected a list of strings"):
        solved(model, "Paris")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row 2 of sentences: '' has no tokens"):
        solved(model, ["Paris", ""])
    with pytest.raises(ValueError, match="row 1 of sentences has 73 tokens, expected at most the model's 64"):
        solved(model, ["Paris " * 70])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot run under"):
        solved(model, ["Paris"])


@pytest.mark.real_model
@EVERY
def test_the_real_model_says_unseen_sentences_of_ten_tokens(every_step: bool, demo_model: tuple[Any, Any]) -> None:
    """Four of five: each way to add the vector has sentences of its own."""
    model, tokenizer = demo_model
    sentences = UNSEEN[::2] if every_step else UNSEEN[1::2]
    assert {len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sentences} == {10}
    result = latent_vectors(model, tokenizer, sentences, layer=14, every_step=every_step, progress=False)
    print(f"{sum(result.exact)} of 5 in {result.seconds:.0f} s, steps {result.steps}")
    assert sum(result.exact) >= 4
    for sentence, vector, exact in list(zip(sentences, result.vectors, result.exact, strict=True))[:3]:
        assert (decode_latent(model, tokenizer, vector, 24) == sentence) is exact


def test_a_tokenizer_whose_first_token_the_model_does_not_have_is_refused() -> None:
    model, tokenizer = tiny_models()[0], spaced_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    with pytest.raises(ValueError, match=f"tokenizer has token id {len(tokenizer) - 1}, expected less than .*27"):
        latent_vectors(model, tokenizer, ["A B"], layer=0, start="A", progress=False)


def test_a_model_is_whole_again_after_a_search_that_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models()[0]
    before = state_of(model)
    text = sayable(model, 1)[0]

    def out_of_memory(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(LatentSearch, "_arguments", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as error:
        solved(model, [text])
    assert error.value is not None  # which keeps the frames, and what they hold, alive
    assert state_of(model) == before
