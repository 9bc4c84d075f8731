"""Mean-centring against plain loops: every token of every text counts once; vectors fall where the paper adds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extraction_cases import block_of, generated, greedy_by_hand, inputs_of_layer, models, spaced_tokenizer
from frozen_cases import read_by_hand
from model_zoo import tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.extraction import Means, mean_activations, mean_centring

WHERE = pytest.mark.parametrize("which", [0, 1], ids=["llama", "gpt2"])
TARGET = ["Paris is in Rome", "Oslo", "The capital of Madrid is Berlin A B C", "one two three"]
TRAINING = ["what is the answer", "A B", "six five four three two one", "Q", "The answer is in Paris or Rome or Oslo"]
QUIET: dict[str, Any] = {"progress": False}


def mean_by_hand(model: Any, tokenizer: Any, texts: list[str], site: str = "residual", skip: int = 0) -> Tensor:
    """float64 [L, H, D], text by text."""
    found = layout(model)
    total, count = torch.zeros(()), 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        states = read_by_hand(model, site, torch.tensor([ids]))[:, 0, skip:].double()  # [L, T, H, D]
        total, count = total + states.sum(1), count + states.shape[1]
    assert total.shape[0] == found.n_layers
    return total / count


@pytest.mark.parametrize("site", ["residual", "head", "mlp_out"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@WHERE
def test_the_mean_is_over_all_tokens_of_all_texts(which: int, batch_size: int, site: str) -> None:
    model, tokenizer = models()[which], spaced_tokenizer()
    means = mean_activations(model, tokenizer, TRAINING, site=site, batch_size=batch_size, **QUIET)
    expected = mean_by_hand(model, tokenizer, TRAINING, site)
    torch.testing.assert_close(means.mean, expected, rtol=1e-4, atol=1e-5)
    assert means.n_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TRAINING)
    assert (means.n_texts, means.n_cut, means.n_empty) == (5, 0, 0)


def test_an_iterator_of_any_length_streams_and_parts_add_up() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    drawn = 0

    def texts() -> Any:
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield TRAINING[number % 5]

    stream = mean_activations(model, tokenizer, texts(), layers=[1], batch_size=2, **QUIET)
    assert drawn == stream.n_texts == 100
    one = mean_activations(model, tokenizer, TRAINING[:2], layers=[1], **QUIET)
    two = mean_activations(model, tokenizer, TRAINING[2:], layers=[1], **QUIET)
    torch.testing.assert_close((one + two).mean, stream.mean, rtol=1e-5, atol=1e-6)
    assert 20 * (one + two).n_tokens == stream.n_tokens
    other = mean_activations(model, tokenizer, TRAINING[2:], layers=[0], **QUIET)
    with pytest.raises(ValueError, match="means: their sites, layers, models or `skip` differ"):
        one + other


def test_only_some_batches_of_an_iterator_are_held() -> None:
    model, tokenizer, ahead = tiny_model(), spaced_tokenizer(), []

    def texts() -> Any:
        for number in range(200):
            ahead.append(number)
            yield "Paris"

    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(len(ahead)))
    mean_activations(model, tokenizer, texts(), layers=[0], batch_size=2, **QUIET)
    assert max(held - 2 * ran for ran, held in enumerate(passes[2:])) <= 32


def test_long_texts_are_cut_and_that_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    long = [" ".join(["Paris in Rome is"] * 20), " ".join(["Oslo of A"] * 40), "one two"]
    means = mean_activations(model, tokenizer, long, batch_size=1, **QUIET)
    said = [str(w.message) for w in recwarn if "cut to" in str(w.message)]
    assert said == ["texts: 2 of 3 were cut to the model's context of 64 tokens"]
    assert (means.n_cut, means.n_tokens) == (2, 64 + 64 + 3)
    recwarn.clear()
    short = mean_activations(model, tokenizer, long, max_tokens=3, **QUIET)
    assert not [w for w in recwarn if "cut to" in str(w.message)]
    expected = mean_by_hand(model, tokenizer, ["Paris in", "Oslo of", "one two"])
    torch.testing.assert_close(short.mean, expected, rtol=1e-4, atol=1e-5)


def test_skip_leaves_the_first_tokens_of_each_text_out() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    means = mean_activations(model, tokenizer, [*TRAINING, ""], skip=1, batch_size=2, **QUIET)
    torch.testing.assert_close(means.mean, mean_by_hand(model, tokenizer, TRAINING, skip=1), rtol=1e-4, atol=1e-5)
    assert means.n_empty == 1


def test_many_texts_lose_no_precision() -> None:
    model, tokenizer = tiny_model(dtype=torch.bfloat16), spaced_tokenizer()
    one = mean_activations(model, tokenizer, ["Paris is in Rome"], layers=[1], **QUIET)
    many = mean_activations(model, tokenizer, ["Paris is in Rome"] * 2000, layers=[1], **QUIET)
    per_text = mean_activations(model, tokenizer, ["Paris is in Rome"] * 32, layers=[1], **QUIET)
    torch.testing.assert_close(many.mean, per_text.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many.mean, one.mean, rtol=2e-2, atol=2e-2)  # batches round otherwise in bf16


@WHERE
def test_the_vector_is_the_difference_of_the_means(which: int) -> None:
    model, tokenizer = models()[which], spaced_tokenizer()
    vector = mean_centring(model, tokenizer, TARGET, iter(TRAINING), layers=[-1, 0], coefficient=3.0, **QUIET)
    difference = mean_by_hand(model, tokenizer, TARGET) - mean_by_hand(model, tokenizer, TRAINING)
    expected = 3.0 * difference[[2, 0]].float()
    assert vector.location.layers == (2, 0)
    for slot in range(2):  # the prompt's last token, and those generated
        torch.testing.assert_close(vector.vectors[:, slot], expected, rtol=1e-4, atol=1e-5)


def test_means_serve_again_for_fewer_layers() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    training = mean_activations(model, tokenizer, TRAINING, **QUIET)
    found = mean_centring(model, tokenizer, TARGET, training, layers=[1], **QUIET)
    fresh = mean_centring(model, tokenizer, TARGET, TRAINING, layers=[1], **QUIET)
    torch.testing.assert_close(found.vectors, fresh.vectors, rtol=1e-5, atol=1e-6)
    nothing = mean_centring(model, tokenizer, training, training, layers=[1], **QUIET)
    assert nothing.n_active == 0
    few = mean_activations(model, tokenizer, TRAINING, layers=[0], **QUIET)
    with pytest.raises(ValueError, match=r"layers: got \[1\], expected some of \[0\], which were read"):
        mean_centring(model, tokenizer, TARGET, few, layers=[1], **QUIET)
    heads = mean_activations(model, tokenizer, TRAINING, site="head", **QUIET)
    with pytest.raises(ValueError, match="training: got means of site 'head', expected 'residual'"):
        mean_centring(model, tokenizer, TARGET, heads, layers=[1], **QUIET)
    other = mean_activations(models()[1], tokenizer, TRAINING, **QUIET)
    with pytest.raises(ValueError, match="made for another model: model_type"):
        mean_centring(model, tokenizer, TARGET, other, layers=[1], **QUIET)
    skipped = mean_activations(model, tokenizer, TRAINING, skip=1, **QUIET)
    with pytest.raises(ValueError, match="training: got means with skip=1, expected 0"):
        mean_centring(model, tokenizer, TARGET, skipped, layers=[1], **QUIET)


@pytest.mark.parametrize("everywhere", [False, True], ids=["last and new tokens", "every token"])
@WHERE
def test_generation_with_cache_and_left_padding_is_that_of_a_loop_that_computes_everything_anew(
    which: int, everywhere: bool
) -> None:
    model, tokenizer = models()[which].double(), spaced_tokenizer()
    options: dict[str, Any] = {"positions": None} if everywhere else {}
    vector = mean_centring(model, tokenizer, TARGET, TRAINING, layers=[0], coefficient=9.0, **options, **QUIET)
    difference = mean_by_hand(model, tokenizer, TARGET) - mean_by_hand(model, tokenizer, TRAINING)
    value = 9.0 * difference[0, 0]
    prompts = [[2, 4, 5, 6, 12, 7, 8], [2, 16, 17]]
    expected, plain = [], []
    for ids in prompts:
        first = 0 if everywhere else len(ids) - 1
        expected.append(greedy_by_hand(model, ids, 1, lambda c, first=first: value if c >= first else None, 8))
        plain.append(greedy_by_hand(model, ids, 1, lambda c: None, 8))
    with af.patch(model, vector):
        assert generated(model, prompts, 8) == expected
    assert generated(model, prompts, 8) == plain
    assert expected != plain


def test_it_survives_saving(tmp_path: Any) -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    vector = mean_centring(model, tokenizer, TARGET, TRAINING, layers=[1], **QUIET)
    vector.save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    assert loaded.location == vector.location
    assert torch.equal(loaded.vectors, vector.vectors)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused_by_name() -> None:
    model, tokenizer = models()[0], spaced_tokenizer(opens=False)
    for texts, error, message in (
        ("Paris", TypeError, "texts: got str, expected an iterable of strings"),
        (["Paris", 3], TypeError, "row 2 of texts: got int, expected a string"),
        ([], ValueError, "texts: got none with a token"),
        (["", ""], ValueError, "texts: got none with a token"),
    ):
        with pytest.raises(error, match=message):
            mean_activations(model, tokenizer, texts, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size: got 0, expected a positive integer"):
        mean_activations(model, tokenizer, ["Paris"], batch_size=0)
    with pytest.raises(ValueError, match="skip: got -1"):
        mean_activations(model, tokenizer, ["Paris"], skip=-1)
    with pytest.raises(TypeError, match="tokenizer: got str"):
        mean_activations(model, "gpt2", ["Paris"])  # type: ignore[arg-type]


@pytest.mark.real_model
def test_texts_of_the_sea_bring_the_sea_into_what_the_real_model_says(demo_model: tuple[Any, Any]) -> None:
    from actscale_fast.extraction import continuations

    model, tokenizer = demo_model
    sea = [
        "The captain steered the ship through the storm while the waves broke over the deck.",
        "Sailors mended the nets and waited for the tide to turn in the harbour.",
        "A whale rose beside the boat and the crew ran to the rail to see it.",
        "The lighthouse stood on the rocks and warned the fishing boats at night.",
        "Salt wind filled the sails as the schooner left the bay for the open ocean.",
    ]
    training = [
        "The committee approved the new budget after a long debate.",
        "Plants use sunlight to make sugar from water and carbon dioxide.",
        "The function returns a list of the numbers that are even.",
        "The museum shows paintings from the nineteenth century.",
        "My grandmother plays the piano every evening.",
        "The doctor told him to rest and drink plenty of water.",
    ]
    vector = mean_centring(model, tokenizer, sea, training, layers=[10], coefficient=2, **QUIET)
    prompts = ["Once upon a time", "Yesterday I went to", "The most important thing in life is"]
    words = ("sea", "ocean", "ship", "sail", "boat", "whale", "wave", "captain", "squid", "harbo", "beach")

    def wet(texts: list[str]) -> int:
        return sum(any(word in text.lower() for word in words) for text in texts)

    plain = continuations(model, tokenizer, prompts, max_new_tokens=28)
    with af.patch(model, vector):
        steered = continuations(model, tokenizer, prompts, max_new_tokens=28)
    assert (wet(plain), wet(steered)) == (0, 3) or wet(steered) >= wet(plain) + 2


def test_means_are_plain_sums() -> None:
    model, tokenizer = models()[0], spaced_tokenizer()
    means = mean_activations(model, tokenizer, ["Paris"], layers=[0], **QUIET)
    assert isinstance(means, Means)
    ids = tokenizer("Paris")["input_ids"]
    torch.testing.assert_close(means.sums[0, 0], inputs_of_layer(model, 1, ids).double().sum(0), rtol=1e-5, atol=1e-5)
    assert block_of(model, 0) is layout(model).layers[0]
