"""The greater-than task: answers on the right side of the year, whatever the tokenizer makes of digits."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from actscale_fast import tasks
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.tasks.greater_than import _EVENTS

#: How years are split, after the families of tokenizers: digits in the prompt's stem and in the answer.
SPLITS = {"pairs": (r"\d\d", 2, 2), "digits": (r"\d", 2, 1), "triples": (r"\d{1,3}", 3, 1)}


def tokenizer_of(pattern: str | None, more: tuple[str, ...] = ()) -> Any:
    """One token a word; runs of digits are cut at every match of the pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    split = pre_tokenizers.Sequence([*cut, pre_tokenizers.Whitespace()])
    texts = [*tasks.GREATER_THAN_TEMPLATES, *_EVENTS, *more]
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    numbers = [f"{n:0{width}d}" for width in (1, 2, 3) for n in range(10**width)]
    vocabulary = ["<unk>", "<pad>", *sorted(found | set(numbers))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(params=SPLITS)
def style(request: pytest.FixtureRequest) -> tuple[Any, int, int]:
    pattern, stem, answer = SPLITS[request.param]
    return tokenizer_of(pattern), stem, answer


def numbers_of(prompt: str) -> tuple[str, str]:
    """The year that is given, and the digits that the prompt ends with."""
    year, stem = re.findall(r"\d+", prompt)
    return year, stem


def test_the_correct_answer_makes_a_later_year_and_the_wrong_one_an_earlier(style: tuple[Any, int, int]) -> None:
    tokenizer, stem_digits, answer_digits = style
    for side in tasks.greater_than(tokenizer, n_train=200, n_test=100, seed=3):
        for example in side:
            year, stem = numbers_of(example.prompt)
            assert example.prompt.endswith(stem)
            assert (len(stem), len(example.correct), len(example.wrong)) == (stem_digits, answer_digits, answer_digits)
            assert year.startswith(stem)
            assert stem + example.wrong < year[: stem_digits + answer_digits] < stem + example.correct


def test_every_answer_is_one_token_behind_its_prompt_as_the_tokenizer_itself_splits_them(
    style: tuple[Any, int, int],
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, _, _ = style
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    train, _ = tasks.greater_than(tokenizer, n_train=50, n_test=1)
    data = EncodedExamples(train, tokenizer, model)
    for example, token in zip(train, data.correct.tolist(), strict=True):
        whole = tokenizer(example.prompt + example.correct)["input_ids"]
        assert whole == [*tokenizer(example.prompt)["input_ids"], token]


def test_answered_digits_are_evenly_spread_and_no_prompt_occurs_twice(style: tuple[Any, int, int]) -> None:
    tokenizer, stem_digits, answer_digits = style
    for side in tasks.greater_than(tokenizer, n_train=400, n_test=200):
        assert len({example.prompt for example in side}) == len(side)
        shown = Counter(
            numbers_of(example.prompt)[0][stem_digits : stem_digits + answer_digits] for example in side
        ).values()
        assert len(shown) == 10**answer_digits - 2  # nothing is below the least, nor above the largest
        assert max(shown) - min(shown) <= 1


def skeletons(side: list[Any]) -> set[str]:
    return {" ".join(w for w in re.findall(r"[a-zA-Z]+", e.prompt) if w not in _EVENTS) for e in side}


def test_held_out_sentences_have_templates_of_their_own(style: tuple[Any, int, int]) -> None:
    train, test = tasks.greater_than(style[0], n_train=400, n_test=200)
    assert skeletons(train).isdisjoint(skeletons(test))
    assert (len(skeletons(train)), len(skeletons(test))) == (9, 3)


def test_aligned_prompts_have_noun_year_and_stem_at_the_same_tokens(style: tuple[Any, int, int]) -> None:
    tokenizer, _, _ = style
    train, test = tasks.greater_than(tokenizer, n_train=100, n_test=40, aligned=True)
    places = set()
    for example in train + test:
        tokens = tokenizer.tokenize(example.prompt)
        noun = next(i for i, token in enumerate(tokens) if token in _EVENTS)
        places.add((len(tokens), noun, *(i for i, token in enumerate(tokens) if token.isdigit())))
    assert len(places) == 1
    assert len(skeletons(train)) + len(skeletons(test)) == 8
    assert skeletons(train).isdisjoint(skeletons(test))


def test_one_seed_gives_one_task() -> None:
    tokenizer = tokenizer_of(r"\d")
    first = tasks.greater_than(tokenizer, n_train=40, n_test=20, seed=7)
    assert first == tasks.greater_than(tokenizer, n_train=40, n_test=20, seed=7)
    assert first.train != tasks.greater_than(tokenizer, n_train=40, n_test=20, seed=8).train


def test_own_templates_are_used_on_either_side() -> None:
    own = ["In {year} a {event} began; it lasted to {stem}", "A {event}: {year} to {stem}"]
    train, test = tasks.greater_than(tokenizer_of(r"\d", tuple(own)), n_train=20, n_test=20, templates=own)
    begun = {text[:2] for text in own}
    assert {e.prompt[:2] for e in train} | {e.prompt[:2] for e in test} == begun
    assert len({e.prompt[:2] for e in train}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"templates": ["{event} {year} {stem}"]}, ValueError, "templates: got 1, expected at least two"),
        ({"templates": ["{event} {year}"] * 2}, ValueError, r"expected the fields \{event\}, \{year\} and \{stem\}"),
        (
            {"templates": ["{event} {year}-{stem}", "{event} {year}/{stem}"]},
            ValueError,
            r"expected it to end in ' \{stem\}'",
        ),
        ({"templates": [3]}, TypeError, "templates: got a int"),
        ({"n_train": 0}, ValueError, "n_train: got 0, expected at least 1"),
        ({"n_test": 10**9}, ValueError, "n_test: got 1000000000, but .* make only"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.greater_than(tokenizer_of(r"\d"), **arguments)


def test_a_tokenizer_whose_years_have_no_answer_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: of a year such as 1732 neither"):
        tasks.greater_than(tokenizer_of(None))
