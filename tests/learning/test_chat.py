"""Chat messages as prompts: the tokens are those of the tokenizer's own template, with its special tokens once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

import actscale_fast as af
from actscale_fast.learning.encoded_examples import EncodedExamples

USER = [{"role": "user", "content": "The capital of B is what"}]
SYSTEM = [{"role": "system", "content": "one two"}, *USER]
PREFILL = [*USER, {"role": "assistant", "content": "The capital is"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ {'user': 'Q ', 'assistant': 'A ', 'system': 'in '}[m['role']] + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A \n' }}{% endif %}"
)
BOS = 2


def chat_tokenizer(*, adds_bos: bool = True, template: str | None = TEMPLATE) -> Any:
    """With a chat template, and (as Llama's) a tokenizer that opens every text with <s> itself."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def chat(messages: list[dict[str, str]], correct: str = "Paris", wrong: str = "Rome") -> af.Example:
    return af.Example(messages=messages, correct=correct, wrong=wrong)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("messages", [USER, SYSTEM, [*PREFILL, *USER]])
def test_a_chat_has_the_tokens_of_the_template_and_no_others(
    adds_bos: bool, template: str, messages: list[dict[str, str]]
) -> None:
    tokenizer = chat_tokenizer(adds_bos=adds_bos, template=template)
    data = EncodedExamples([chat(messages)], tokenizer, tiny.llama())
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert data.prompts == [expected]
    assert expected.count(BOS) == ("bos_token" in template)
    assert tokenizer.convert_ids_to_tokens([int(data.correct), int(data.wrong)]) == ["Paris", "Rome"]


def test_an_answer_continues_a_last_message_of_the_assistant() -> None:
    tokenizer = chat_tokenizer()
    data = EncodedExamples([chat(PREFILL, " Paris", " Rome")], tokenizer, tiny.llama())
    expected = tokenizer("<s>Q The capital of B is what\nA The capital is", add_special_tokens=False)["input_ids"]
    assert data.prompts == [expected]


def test_fit_evaluate_sweep_and_attribution_take_a_chat_as_the_text_that_it_becomes() -> None:
    model, tokenizer = tiny.llama(), chat_tokenizer()
    chats = [chat(USER), chat(SYSTEM, "Oslo", "Madrid")]
    texts = []
    for example in chats:
        text = tokenizer.apply_chat_template(list(example.messages or ()), tokenize=False, add_generation_prompt=True)
        texts.append(af.Example(text, example.correct, example.wrong))
    found = []
    for examples in (chats, texts):
        scalars = af.ActivScalar.for_model(model)
        af.fit(model, tokenizer, examples, scalars, steps=2, progress=False)
        swept = af.sweep(model, tokenizer, examples, {"seed": [0]}, steps=2, evaluate_on=examples, progress=False)
        found.append(
            (
                scalars.alpha.detach().tolist(),
                af.evaluate(model, tokenizer, examples, scalars),
                swept.fits[0].evaluation,
                af.attribution(model, tokenizer, examples, progress=False).scores.tolist(),
            )
        )
    assert found[0] == found[1]


def test_a_source_may_be_a_chat_too() -> None:
    model, tokenizer = tiny.llama(), chat_tokenizer()
    das = af.BoundlessDAS.for_model(model, layers=[1], positions=[-1])
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    read = [af.source_activations(model, tokenizer, das, [source]) for source in (USER, text)]
    assert torch.equal(*read)
    pair = af.Example(messages=SYSTEM, correct="Paris", wrong="Rome", source=USER)
    same = af.Example(messages=SYSTEM, correct="Paris", wrong="Rome", source=text)
    assert af.evaluate(model, tokenizer, [pair], das) == af.evaluate(model, tokenizer, [same], das)


def test_chats_that_no_template_can_write_are_refused_by_row() -> None:
    model = tiny.llama()
    with pytest.raises(
        ValueError, match="row 2 of examples has messages, but the tokenizer has no chat template; give"
    ):
        EncodedExamples([af.Example("A", " Paris", " Rome"), chat(USER)], tiny.tokenizer(), model)
    tool = [{"role": "tool", "content": "one"}]
    with pytest.raises(
        ValueError, match=r"row 2 of examples: the tokenizer's chat template refuses .* \(no tools here\)"
    ):
        EncodedExamples([chat(USER), chat(tool)], chat_tokenizer(), model)
    with pytest.raises(ValueError, match="row 1 of examples has 68 tokens, expected at most the model's 64"):
        EncodedExamples([chat([{"role": "user", "content": "one " * 65}])], chat_tokenizer(adds_bos=False), model)


def said(examples: Any, tokenizer: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EncodedExamples(examples, tokenizer, tiny.llama())
    return [str(warning.message) for warning in caught]


def test_prompts_that_end_with_a_space_are_said_once_with_their_number() -> None:
    good, bad = ("The capital is", " Paris", " Rome"), ("The capital is ", "Paris", "Rome")
    assert said([good, good], tiny.tokenizer()) == []
    assert said([("The capital is\n", "Paris", "Rome")], tiny.tokenizer()) == []
    (one,) = said([good, bad, good], tiny.tokenizer())
    assert one.startswith("row 2 of examples ends with a space. Tokenizers join a space to the word after it")
    (many,) = said([good, bad, bad, bad], tiny.tokenizer())
    assert many.startswith("row 2 of examples and 2 more rows end with a space")
    spaced = [*PREFILL[:1], {"role": "assistant", "content": "The capital is "}]
    (prefilled,) = said([chat(PREFILL, " Paris", " Rome"), chat(spaced)], chat_tokenizer())
    assert prefilled.startswith("row 2 of examples ends with a space")


def test_answers_that_begin_with_a_space_after_a_templates_line_break_are_said_once() -> None:
    spaced = chat(USER, " Paris", " Rome")
    assert said([chat(USER)], chat_tokenizer()) == []
    (once,) = said([chat(USER), spaced, spaced], chat_tokenizer())
    assert once.startswith(
        "row 2 of examples and 1 more row have answers that begin with a space, but the chat template"
    )
    assert said([spaced], chat_tokenizer(template=TEMPLATE.replace("'A \n'", "'A'"))) == []
