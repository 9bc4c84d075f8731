"""Every shortcut is compared with the plain whole model when an engine opens, and the model's own gradient with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import PROMPTS, TokenExamples, assert_equal_to_rounding, engine, full
from fit_cases import conflicts
from model_zoo import randomised, tiny_model
from tiny import llama, tokenizer
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.learning.engine import Engine, GradientError

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)


def state_passed_on(model: nn.Module) -> None:
    """Layer 1 adds what layer 0 has noted beside the hidden states, as a router's state is passed on."""
    inner, noted = type(model.model.layers[0]).forward, {}

    class Passing(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = noted.get("state", 0.0) if self.index else 0.0
            output = inner(self, hidden + before, *args, **kwargs)
            noted["state"] = 0.3 * output.roll(1, -1)
            return output

    for index, layer in enumerate(model.model.layers):
        layer.index, layer.__class__ = index, Passing
    model.model.register_forward_pre_hook(lambda *_: noted.clear())


def padding_counts(model: nn.Module) -> None:
    """The first token of a row is added to all, padding or not."""
    inner = type(model.model.layers[0]).forward

    class Padded(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(self, hidden + 0.5 * hidden[:, :1], *args, **kwargs)

    model.model.layers[0].__class__ = Padded


def looks_ahead(model: nn.Module) -> None:
    """Every token sees the mean of the row: what stands before the first steered token is not constant."""
    inner = type(model.model.layers[0]).forward

    class Ahead(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(self, hidden + 0.5 * hidden.mean(1, keepdim=True), *args, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Ahead


@pytest.mark.parametrize("change", [state_passed_on, padding_counts, looks_ahead])
@pytest.mark.parametrize("where", [{"layers": [1]}, {"positions": [-1]}, {"layers": [1], "positions": [-2, -1]}])
def test_where_a_shortcut_disagrees_the_plain_way_is_taken_and_said(change: Any, where: dict[str, Any]) -> None:
    model, data = tiny_model(dtype=torch.float64), TokenExamples(PROMPTS[:3])
    change(model)
    one = randomised(af.ActivScalar.for_model(model, **where), scale=0.3)
    expected = full(model, data, one, OBJECTIVE)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: .*(continuing|runs instead)"):
        found = engine(model, data, one, OBJECTIVE)
    assert_equal_to_rounding(found, expected, 1e-5)


def test_evaluation_takes_the_whole_model_where_parts_disagree() -> None:
    model = llama()
    examples = conflicts(4)
    one = af.ActivScalar.for_model(model)
    plain = af.evaluate(model, tokenizer(), examples, one).baseline
    changed = llama()
    padding_counts(changed)
    found = [af.evaluate(changed, tokenizer(), [example], one).baseline for example in examples]
    together = af.evaluate(changed, tokenizer(), examples, one).baseline
    assert plain is not None
    assert together is not None
    mean = sum(one.logit_difference for one in found if one is not None) / len(found)
    assert together.logit_difference == pytest.approx(mean, abs=1e-5)
    assert together.logit_difference != pytest.approx(plain.logit_difference, abs=1e-3)


# --- a model without a backward -----------------------------------------------------------------------------------


class Detached(nn.Linear):
    """As a quantiser's kernel that runs under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros(*dy.shape[:-1], 32, dtype=dy.dtype), None


class Wrong(nn.Linear):
    """A backward that gives nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x, self.weight)


class OnlyOnce(nn.Linear):
    """Repacks its weight in a pass without gradients, as bitsandbytes' 4-bit layers do on a CPU."""

    repacked = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.repacked = True
        return super().forward(x.detach() if self.repacked else x)


def exchanged(model: nn.Module, kind: type[nn.Linear], name: str) -> None:
    for layer in model.model.layers:
        part = layer.get_submodule(name)
        part.__class__ = kind


@pytest.mark.parametrize("kind", [Detached, OnlyOnce])
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_a_backward_is_an_error_that_names_its_class(kind: Any, name: str, dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    exchanged(model, kind, name)
    one = af.ActivScalar.for_model(model)
    with pytest.raises(GradientError, match=rf"{name}, a {kind.__name__}, computes an output without a gradient"):
        af.fit(model, tokenizer(), conflicts(6), one, steps=2, progress=False)
    with pytest.raises(GradientError, match=kind.__name__):
        af.attribution(model, tokenizer(), conflicts(6), knock_out=False, progress=False)
    with pytest.raises(GradientError, match=kind.__name__):
        af.sweep(model, tokenizer(), conflicts(6), {"seed": [0]}, steps=1, progress=False)


def test_a_gradient_that_is_not_the_forward_passs_is_an_error() -> None:
    model = llama()
    exchanged(model, Wrong, "self_attn.o_proj")
    with pytest.raises(GradientError, match="the gradient of LlamaForCausalLM is not that of its forward pass"):
        af.fit(model, tokenizer(), conflicts(6), af.ActivScalar.for_model(model), steps=2, progress=False)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_fit_at_a_site_that_cannot_act_is_an_error(site: str) -> None:
    model = tiny_model("gemma2", vocab_size=61)
    with pytest.warns(UserWarning, match="cannot act"):
        one = af.ActivScalar.for_model(model, site=site)
    with pytest.raises(ValueError, match="a factor changes nothing, because a norm without scale follows the site"):
        af.fit(model, tokenizer(), conflicts(6), one, steps=1, progress=False)


def test_a_fit_beside_a_site_that_cannot_act_goes_on() -> None:
    model = tiny_model("gemma2", vocab_size=61)
    with pytest.warns(UserWarning, match="cannot act"):
        both = af.ActivScalar.for_model(model, site="attn_out") + af.ActivScalar.for_model(model)
    af.fit(model, tokenizer(), conflicts(6), both, steps=1, progress=False)


def test_the_trial_leaves_parameters_modes_and_random_numbers_as_they_were() -> None:
    model, data = tiny_model(), TokenExamples()
    one = randomised(af.ActivScalar.for_model(model))
    before, state = one.alpha.detach().clone(), torch.get_rng_state()
    with Engine(model, data, one, [OBJECTIVE]):
        assert torch.equal(one.alpha, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.alpha.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_knock_outs_run_the_whole_model_where_layers_pass_state_on() -> None:
    model = llama(dtype=torch.float64)
    state_passed_on(model)
    examples = conflicts(4)
    with pytest.warns(UserWarning, match="running some layers only"):
        found = af.attribution(model, tokenizer(), examples, progress=False)
    one = af.ActivScalar.for_model(model)
    with torch.no_grad():
        one.alpha[1, 0, 2] = -1.0
    evaluation = af.evaluate(model, tokenizer(), examples, one)
    assert evaluation.baseline is not None
    change = evaluation.logit_difference - evaluation.baseline.logit_difference
    assert found.knock_out is not None
    assert float(found.knock_out[1, 0, 2]) == pytest.approx(change, abs=1e-5)


def test_in_16_bits_a_block_whose_output_is_detached_is_an_error_too() -> None:
    model = llama(dtype=torch.bfloat16)
    inner = type(model.model.layers[0].mlp).forward

    class Block(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return inner(self, x).detach()

    for layer in model.model.layers:
        layer.mlp.__class__ = Block
    with pytest.raises(GradientError, match=r"mlp, a Block, computes an output without a gradient"):
        af.fit(model, tokenizer(), conflicts(6), af.ActivScalar.for_model(model), steps=1, progress=False)


def test_a_backward_that_is_a_tenth_off_is_an_error_in_float32() -> None:
    class Damped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            return 0.8 * dy

    model = llama()
    inner = type(model.model.layers[0]).forward

    class Layer(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return Damped.apply(inner(self, *args, **kwargs))

    for layer in model.model.layers:
        layer.__class__ = Layer
    with pytest.raises(GradientError, match="is not that of its forward pass"):
        af.fit(model, tokenizer(), conflicts(6), af.ActivScalar.for_model(model), steps=1, progress=False)
