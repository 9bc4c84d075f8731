"""Heads that read a stored run, against plain hooks in float64: run twice, and head interchange."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast.interventions import HeadInterchange, RunTwice

PROMPTS = ["The capital of A is", "Q The capital of B is Rome answer", "The one"]
SOURCES = ["The capital of C is", "what is the capital of A in", "six five"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(dtype=torch.float64)


def projections(model: Any) -> list[Any]:
    return [layer.self_attn.o_proj for layer in model.model.layers]


@contextlib.contextmanager
def hooked(model: Any, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """`edit(layer, [T, 4, 8])` at the input of each output projection, for one prompt."""

    def pre(layer: int) -> Callable[..., Any]:
        return lambda module, args: (edit(layer, args[0][0].unflatten(-1, (4, 8))).flatten(1)[None],)

    handles = [module.register_forward_pre_hook(pre(layer)) for layer, module in enumerate(projections(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ids_of(text: str) -> Tensor:
    return tiny.tokenizer()(text, return_tensors="pt")["input_ids"]


def first_run(model: Any, text: str) -> list[Tensor]:
    """The heads [T, 4, 8] of each layer, unsteered."""
    seen: list[Tensor] = []

    def note(layer: int, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    with hooked(model, note), torch.no_grad():
        model(ids_of(text))
    return seen


def padded() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def test_the_second_run_adds_the_heads_of_the_first_at_every_token_of_prompts_of_any_length(model: Any) -> None:
    twice = RunTwice.for_prompts(model, 9, layers=[0, 2])
    alpha = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    twice.alpha.data[:, 0] = alpha
    stored = af.source_activations(model, tiny.tokenizer(), twice, PROMPTS)
    beta = torch.tensor([1.0, -0.5, 2.0])
    with torch.no_grad(), twice.interchange(stored), af.patch(model, twice, strength=beta):
        found = model(**padded()).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        stored_by_layer = first_run(model, prompt)

        def add(layer: int, x: Tensor, row: int = row, runs: list[Tensor] = stored_by_layer) -> Tensor:
            if layer == 1:
                return x
            return x + beta[row].double() * alpha[layer // 2].double()[:, None] * runs[layer]

        with hooked(model, add), torch.no_grad():
            expected = model(ids_of(prompt)).logits[0, -1]
        torch.testing.assert_close(found[row], expected)


def test_an_interchange_takes_the_share_of_its_gate_from_the_source(model: Any) -> None:
    exchange = HeadInterchange.for_model(model, positions=[-1, -2], layers=[1, 2])
    gates = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    exchange.gates.data[:, 0] = gates
    source = af.source_activations(model, tiny.tokenizer(), exchange, SOURCES)
    with torch.no_grad(), exchange.interchange(source), af.patch(model, exchange):
        found = model(**padded()).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        other = first_run(model, SOURCES[row])

        def swap(layer: int, x: Tensor, other: list[Tensor] = other) -> Tensor:
            if layer == 0:
                return x
            m = gates[layer - 1].double()[:, None]
            return torch.cat([x[:-2], (1 - m) * x[-2:] + m * other[layer][-2:]])

        with hooked(model, swap), torch.no_grad():
            expected = model(ids_of(prompt)).logits[0, -1]
        torch.testing.assert_close(found[row], expected)


def test_generation_edits_the_prompt_alone_and_beams_share_its_source(model: Any) -> None:
    twice = RunTwice.for_prompts(model, 9)
    twice.alpha.data.fill_(0.7)
    ids = ids_of(PROMPTS[1])
    stored = af.source_activations(model, tiny.tokenizer(), twice, [PROMPTS[1]])
    with torch.no_grad(), twice.interchange(stored), af.patch(model, twice):
        made = model.generate(ids, max_new_tokens=3, do_sample=False)
        beams = model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2)
    runs = first_run(model, PROMPTS[1])
    tokens = ids
    for _ in range(3):

        def add(layer: int, x: Tensor) -> Tensor:
            n = ids.shape[1]
            return torch.cat([x[:n] + 0.7 * runs[layer], x[n:]])

        with hooked(model, add), torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert made.tolist() == tokens.tolist()
    assert beams.shape[1] >= ids.shape[1] + 1


@pytest.mark.parametrize("kind", [RunTwice, HeadInterchange])
def test_saved_and_loaded_they_are_the_same_class_at_the_same_place(kind: type, model: Any, tmp_path: Path) -> None:
    made = kind.for_model(model, positions=[-2, -1], layers=[1])
    next(made.parameters()).data[0, 0, 2] = 0.5
    made.save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    assert type(loaded) is kind
    assert loaded.location == made.location
    assert next(loaded.parameters()).tolist() == next(made.parameters()).tolist()
    assert made.n_active == 1


def test_evaluate_reads_the_first_run_of_the_prompts_and_the_source_of_the_examples(model: Any) -> None:
    examples = [
        af.Example(prompt, " Paris", " Rome", source=source) for prompt, source in zip(PROMPTS, SOURCES, strict=True)
    ]
    twice = RunTwice.for_prompts(model, 9)
    twice.alpha.data.fill_(0.4)
    exchange = HeadInterchange.for_model(model, positions=[-1])
    exchange.gates.data.fill_(1.0)
    for made in (twice, exchange):
        evaluation = af.evaluate(model, tiny.tokenizer(), examples, made, batch_size=2)
        differences = []
        for example in examples:
            source = af.source_activations(
                model, tiny.tokenizer(), made, [example.prompt if made is twice else example.source]
            )
            with torch.no_grad(), made.interchange(source), af.patch(model, made):
                logits = model(ids_of(example.prompt)).logits[0, -1]
            correct, wrong = (tiny.WORDS.index(word) for word in ("Paris", "Rome"))
            differences.append(float(logits[correct] - logits[wrong]))
        assert evaluation.logit_difference == pytest.approx(sum(differences) / 3, rel=1e-5)


def test_what_cannot_be_paired_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="positions: got None"):
        HeadInterchange.for_model(model)
    with pytest.raises(ValueError, match="acts at the site 'head'"):
        HeadInterchange.for_model(model, site="residual", positions=[-1])
    twice = RunTwice.for_prompts(model, 4)
    with pytest.raises(ValueError, match=r"row 1 of texts: the prompt has 5 tokens, but .* for the last 4"):
        af.source_activations(model, tiny.tokenizer(), twice, PROMPTS[:1])
    with pytest.raises(RuntimeError, match="a RunTwice ran without"), af.patch(model, twice):
        model(ids_of(PROMPTS[0]))
    with pytest.raises(ValueError, match="longest: got 0"):
        RunTwice.for_prompts(model, 0)
