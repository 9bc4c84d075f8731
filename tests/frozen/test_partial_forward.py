"""Partial runs of a model, and a model that is exactly as before once they are over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import TokenExamples, assert_equal_to_rounding, engine, full
from frozen_cases import state_of
from model_zoo import CONFIGS, IDS, checkpoint_activations, randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.arguments import cache_argument
from actscale_fast.architectures.layout import layout
from actscale_fast.frozen.partial_forward import PartialForward, Prefix, keys_and_values
from actscale_fast.learning.engine import Engine, FitRequest

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)


def scalars(model: Any, **where: Any) -> af.ActivScalar:
    made = randomised(af.ActivScalar.for_model(model, **where))
    with torch.no_grad():
        made.alpha.mul_(0.3)
    return made  # type: ignore[return-value]


def step(model: Any, **where: Any) -> tuple[Tensor, list[Tensor]]:
    return engine(model, TokenExamples(), scalars(model, **where), OBJECTIVE)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_model_is_as_before(family: str) -> None:
    model = tiny_model(family)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.train()
    layout(model).layers[0].eval()
    before = state_of(model)
    step(model, layers=[1], positions=[-1])
    assert state_of(model) == before
    fresh = tiny_model(family)
    assert torch.equal(model.eval()(IDS).logits, fresh(IDS).logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("at_call", [1, 2, 3, 4], ids=["head", "preparation", "count", "step"])
def test_the_model_is_as_before_after_an_error_at_any_time(error: type[BaseException], at_call: int) -> None:
    model, calls = tiny_model(), []
    model.train()

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise error

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(error):
        engine(model, TokenExamples(), scalars(model, layers=[1]), OBJECTIVE)
    assert state_of(model) == before
    calls += [1] * 10
    expected = step(tiny_model(), layers=[1])
    assert_equal_to_rounding(step(model, layers=[1]), expected, 0.0)


def test_a_step_goes_on_after_an_error_in_the_one_before() -> None:
    model, data, failing = tiny_model(), TokenExamples(), [False]
    intervention = scalars(model, positions=[-1])

    def fail(*_: Any) -> None:
        if failing[0]:
            raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with Engine(model, data, intervention, [OBJECTIVE]) as opened:
        first = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
        failing[0] = True
        with pytest.raises(KeyboardInterrupt):
            opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
        failing[0] = False
        again = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1][0], again[1][0])


@pytest.mark.parametrize(
    "where", [{}, {"layers": [1]}, {"positions": [-1]}, {"site": "residual", "layers": [1]}], ids=str
)
@pytest.mark.parametrize("kind", ["all tokens", "positions", "residual"])
def test_a_patch_of_the_callers_is_part_of_the_frozen_model(where: dict[str, Any], kind: str) -> None:
    options = {
        "all tokens": {},
        "positions": {"positions": [0, -2]},
        "residual": {"site": "residual", "layers": [0]},
    }[kind]
    model, data = tiny_model(dtype=torch.float64), TokenExamples()
    theirs = randomised(af.ActivScalar.for_model(model, **options), seed=5)
    with torch.no_grad():
        theirs.alpha.mul_(0.4)
    plain = model(IDS).logits
    with af.patch(model, theirs, strength=-0.5):
        steered = model(IDS).logits
        before = state_of(model)
        for intervention in (scalars(model, **where), af.ActivScalar.for_model(model, **where)):
            found = engine(model, data, intervention, OBJECTIVE)
            assert state_of(model) == before
            expected = full(model, data, intervention, OBJECTIVE)  # its β = 0 pauses the inner patch alone
            assert_equal_to_rounding(found, expected)
            assert found[1][0].any()
        assert torch.equal(model(IDS).logits, steered)
    assert torch.equal(model(IDS).logits, plain)
    assert not torch.equal(plain, steered)


def test_engines_one_after_the_other_know_nothing_of_each_other() -> None:
    model = tiny_model(dtype=torch.float64)
    expected = [step(tiny_model(dtype=torch.float64), **where) for where in ({"positions": [-1]}, {"layers": [1]})]
    for _ in range(2):
        for where, one in zip(({"positions": [-1]}, {"layers": [1]}), expected, strict=True):
            found = step(model, **where)
            assert torch.equal(found[0], one[0])
            assert torch.equal(found[1][0], one[1][0])


def test_an_engine_inside_another_ones_block_sees_it_at_rest_and_leaves_it_whole() -> None:
    model, data = tiny_model(dtype=torch.float64), TokenExamples()
    outer = scalars(model, layers=[1])
    with Engine(model, data, outer, [OBJECTIVE]) as opened:
        first = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
        with pytest.raises(ValueError, match=r"strength: got \d+ values for a batch of"):
            step(model, positions=[-1])
        again = opened.gradients([FitRequest([0, 1, 2, 3], OBJECTIVE)])
    assert torch.equal(first[1][0], again[1][0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_dropout_of_a_model_in_training_change_nothing(family: str, reentrant: bool) -> None:
    names = {
        "gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
        "opt": ("dropout", "attention_dropout"),
        "gpt_neox": ("hidden_dropout", "attention_dropout"),
        "llama": ("attention_dropout",),
    }[family]
    model = tiny_model(family, dtype=torch.float64, **dict.fromkeys(names, 0.5))
    checkpoint_activations(model, reentrant)
    model.train()
    before = state_of(model)
    for where in ({}, {"positions": [-1], "layers": [1]}):
        intervention = scalars(model, **where)
        found = engine(model, TokenExamples(), intervention, OBJECTIVE)
        expected = full(tiny_model(family, dtype=torch.float64), TokenExamples(), intervention, OBJECTIVE)
        assert_equal_to_rounding(found, expected)
    assert state_of(model) == before


def on_device(model: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("placed", [on_device, offloaded])
@pytest.mark.parametrize("where", [{}, {"layers": [1]}, {"positions": [-1]}], ids=str)
def test_accelerates_hooks_stay_in_force(placed: Callable[[Any], None], where: dict[str, Any]) -> None:
    model, plain = tiny_model(), tiny_model()
    placed(model)
    before = state_of(model)
    assert_equal_to_rounding(step(model, **where), step(plain, **where), 1e-5)
    if placed is on_device:
        assert state_of(model) == before
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma3_text", "mpt"])
def test_a_model_may_run_in_two_parts(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    found = layout(model)
    arguments = {"input_ids": IDS, "use_cache": False}
    whole = model(IDS, output_hidden_states=True)
    with torch.no_grad(), PartialForward(found, None) as section:
        with pytest.raises(RuntimeError, match="first run must include all layers"):
            section.run(arguments, end=1)
        noted = section.run(arguments, wanted=[1, 2])[1]
        lower, _ = section.run(arguments, end=1)
        logits, _ = section.run(arguments, first=1, hidden=lower)
        only_head, _ = section.run(arguments, first=2, hidden=noted[2])
    assert sorted(noted) == [1, 2]
    for one, other in (
        (lower, whole.hidden_states[1]), (noted[1], lower), (logits, whole.logits[:, -1]), (only_head, logits),
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma3_text", "mpt"])
@pytest.mark.parametrize("first", [0, 1])
def test_the_last_tokens_may_run_on_kept_keys_and_values(family: str, first: int) -> None:
    from transformers import DynamicCache

    model, cache = tiny_model(family, dtype=torch.float64), DynamicCache()
    found = layout(model)
    with torch.no_grad(), PartialForward(found, None) as section:
        arguments = {"input_ids": IDS, "use_cache": True, cache_argument(model): cache}
        whole, noted = section.run(arguments, wanted=[1])
        layers = [keys_and_values(cache, index) for index in range(first, 2)]
        kept = [(keys[:, :, :4].clone(), values[:, :, :4].clone()) for keys, values in layers]
        prefix = Prefix(first, kept, 3, 4, torch.device("cpu"))
        hidden = noted[1][:, 4:] if first else None
        for _ in range(2):  # a run leaves the prefix as it is
            part, _ = section.run({"input_ids": IDS[:, 4:]}, first=first, hidden=hidden, prefix=prefix)
            torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)


def test_a_model_that_notes_more_than_logits_is_the_same() -> None:
    expected = step(tiny_model(), positions=[-1])
    for name in ("output_hidden_states", "output_attentions", "use_cache"):
        model = tiny_model()
        model.set_attn_implementation("eager")
        setattr(model.config, name, True)
        assert_equal_to_rounding(step(model, positions=[-1]), expected, 1e-5)


def test_attention_implementations_agree() -> None:
    for where in ({}, {"positions": [-2, -1], "layers": [1]}):
        results = []
        for implementation in ("eager", "sdpa"):
            model = tiny_model()  # eager attention takes its softmax in float32 whatever the dtype
            model.set_attn_implementation(implementation)
            results.append(step(model, **where))
        assert_equal_to_rounding(*results, 1e-5)
