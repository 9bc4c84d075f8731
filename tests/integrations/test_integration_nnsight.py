"""nnsight: an intervention inside a trace equals `af.patch` on the wrapped model, in rows, steps and gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from model_zoo import IDS, SITES, randomised, scalars, tiny_model
from nnsight import NNsight, TransformersModel
from torch import Tensor

import actscale_fast as af
from actscale_fast.das.boundless_das import BoundlessDAS
from actscale_fast.integrations.nnsight import steer

STRENGTHS = torch.tensor([1.0, -0.5, 0.25])
TEXTS = ["The capital of A is", "of A is"]


def traced(net: Any, intervention: af.Intervention, strength: float | Tensor = 1.0, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        with net.trace(IDS):
            steer(net, intervention, strength, **kwargs)
            found = net.output.logits.save()
        return found  # noqa: RET504 -- assigned inside the trace, which runs when it closes


def patched(model: Any, intervention: af.Intervention, strength: float | Tensor = 1.0, **kwargs: Any) -> Tensor:
    with torch.no_grad(), af.patch(model, intervention, strength, **kwargs):
        return model(IDS).logits


def language_model() -> tuple[Any, Any, Any]:
    """(nnsight's model, the Hugging Face model in it, its tokenizer, which pads on the left)."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    tokenizer.padding_side = "left"
    return TransformersModel(model, tokenizer=tokenizer, task="text-generation"), model, tokenizer


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma2", "gpt_neox"])
def test_a_trace_computes_what_a_patch_computes_at_every_site_row_by_row(
    family: str, positions: list[int] | None
) -> None:
    model = tiny_model(family)
    net = NNsight(model)
    for site in SITES:
        for kind in (af.ActivScalar, af.SteerVec):
            intervention = randomised(kind.for_model(model, site=site, positions=positions))
            assert torch.equal(traced(net, intervention, STRENGTHS), patched(model, intervention, STRENGTHS))


def test_stacks_and_parts_at_several_sites_are_applied_in_the_order_of_the_pass() -> None:
    model = tiny_model("llama")
    net = NNsight(model)
    stack, group = af.ActivScalar.stack([scalars(model, 1), scalars(model, 2)]), torch.tensor([1, 0, 1])
    assert torch.equal(traced(net, stack, 0.5, group=group), patched(model, stack, 0.5, group=group))
    vector = randomised(af.SteerVec.for_model(model, site="residual", layers=[0]))
    composite = vector + 2.0 * scalars(model, 3, positions=[-1]) + randomised(af.SteerVec.for_model(model))
    assert torch.equal(traced(net, composite, STRENGTHS), patched(model, composite, STRENGTHS))


def test_each_part_acts_at_the_module_that_it_names() -> None:
    model = tiny_model("gemma3_text")
    net = NNsight(model)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    first, second = (randomised(af.ActivScalar.for_model(model, site="mlp_out", mlp=norm)) for norm in norms)
    assert torch.equal(traced(net, first + second), patched(model, first + second))
    assert not torch.equal(traced(net, first + second), traced(net, first))


def test_a_trace_without_steering_is_as_before() -> None:
    model = tiny_model("llama")
    net, before = NNsight(model), model(IDS).logits
    assert torch.equal(traced(net, scalars(model), 0.0), before)
    traced(net, scalars(model))
    with net.trace(IDS):
        found = net.output.logits.save()
    assert torch.equal(found, before)
    assert torch.equal(model(IDS).logits, before)


def test_an_empty_invoke_reads_below_what_another_one_steered() -> None:
    model = tiny_model("llama")
    net, intervention = NNsight(model), scalars(model)
    with torch.no_grad():
        with net.trace() as tracer:
            with tracer.invoke(IDS):
                steer(net, intervention)
            with tracer.invoke():
                first = net.model.layers[0].output.save()
        with af.patch(model, intervention):
            expected = model(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(first, expected)


@pytest.mark.parametrize("positions", [None, [0, -1]])
def test_each_invoke_of_a_padded_batch_has_its_own_steering(positions: list[int] | None) -> None:
    net, model, tokenizer = language_model()
    intervention = scalars(model, positions=positions)
    with torch.no_grad():
        with net.trace() as tracer:
            with tracer.invoke(TEXTS[0]):
                steer(net, intervention)
                first = net.output.logits.save()
            with tracer.invoke(TEXTS[1]):
                steer(net, intervention, torch.tensor([-1.0]))
                second = net.output.logits.save()
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        with af.patch(model, intervention, torch.tensor([1.0, -1.0])):
            expected = model(**batch).logits
    torch.testing.assert_close(torch.cat([first, second])[:, -3:], expected[:, -3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", [{}, {"positions": [0, -1]}, {"positions": [1], "generated": True}])
def test_every_step_of_a_generation_is_steered_as_a_patch_steers_it(where: dict[str, Any]) -> None:
    net, model, tokenizer = language_model()
    intervention, strength = scalars(model, **where), torch.tensor([1.0, -1.0])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the open loop ends with the generation
            with net.generate(**options) as tracer:
                with tracer.invoke(TEXTS):
                    steer(net, intervention, strength, steps=tracer.iter[:])
                with tracer.invoke():
                    found = tracer.result.save()
        with af.patch(model, intervention, strength):
            expected = model.generate(**tokenizer(TEXTS, return_tensors="pt", padding=True), **options)
        plain = model.generate(**tokenizer(TEXTS, return_tensors="pt", padding=True), **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_scalars_get_the_gradients_that_they_get_from_a_patch() -> None:
    model = tiny_model("llama").requires_grad_(False)
    net, intervention = NNsight(model), scalars(model)
    with net.trace(IDS):
        steer(net, intervention)
        loss = net.output.logits.square().mean().save()
    loss.backward()
    found, intervention.alpha.grad = intervention.alpha.grad, None
    with af.patch(model, intervention):
        loss = model(IDS).logits.square().mean()
        loss.backward()
    assert found is not None
    assert torch.equal(found, intervention.alpha.grad)


def test_what_cannot_be_is_refused_by_name() -> None:
    model = tiny_model("llama")
    net = NNsight(model)
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM, expected an nnsight model"):
        steer(model, scalars(model))
    with pytest.raises(ValueError, match="made for another model: model_type 'gpt2'"):
        steer(net, scalars(tiny_model("gpt2")))
    with pytest.raises(TypeError, match="BoundlessDAS needs the activations of a source"):
        steer(net, BoundlessDAS.for_model(model, site="residual", layers=[0], positions=[-1]))
    with pytest.raises(ValueError, match="strength: got 2 values for a batch of 3 rows"):
        traced(net, scalars(model), torch.tensor([1.0, 2.0]))


@pytest.mark.real_model
def test_the_real_model_answers_as_it_does_under_a_patch(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    prompt = "The capital of Germany is Paris. Q: What is the capital of Germany? A:"
    intervention = randomised(af.ActivScalar.for_model(model, positions=[0, -1], generated=True), scale=0.3)
    net = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    with torch.no_grad():
        with net.trace(prompt):
            steer(net, intervention)
            found = net.output.logits.save()
        with af.patch(model, intervention):
            assert torch.equal(found, model(**tokenizer(prompt, return_tensors="pt")).logits)
