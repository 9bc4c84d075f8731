"""A module that is exchanged, shared or used twice under a patch is noticed at the next forward pass at the latest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import word_models
from model_zoo import IDS, logits, scalars, tiny_model
from torch import nn

import actscale_fast as af


def new_projection(model: nn.Module) -> None:
    model.model.layers[1].self_attn.o_proj = copy.deepcopy(model.model.layers[0].mlp.gate_proj)


def new_attention(model: nn.Module) -> None:
    model.model.layers[0].self_attn = copy.deepcopy(model.model.layers[0].self_attn)


def new_layer(model: nn.Module) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


def shared_layer(model: nn.Module) -> None:
    model.model.layers[1] = model.model.layers[0]


def shared_projection(model: nn.Module) -> None:
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj


def new_layers(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList(list(model.model.layers))


def new_decoder(model: nn.Module) -> None:
    model.model = copy.deepcopy(model.model)


CHANGES = [new_projection, new_attention, new_layer, shared_layer, shared_projection, new_layers, new_decoder]


#: The compiler is slow: two of the changes show that it traces the check.
CASES = [(change, False) for change in CHANGES] + [(new_projection, True), (shared_layer, True)]


@pytest.mark.parametrize(("change", "compiled"), CASES)
def test_a_module_exchanged_under_a_patch_is_an_error_at_the_next_pass(
    change: Callable[[nn.Module], None], compiled: bool
) -> None:
    model = tiny_model()
    call = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad(), af.patch(model, scalars(model)):
        call(IDS)
        change(model)
        with pytest.raises(RuntimeError, match="was exchanged while an intervention was applied"):
            call(IDS)


@pytest.mark.parametrize("site", ["head", "attn_out"])
def test_a_change_at_a_layer_that_is_not_steered_is_noticed_where_it_shares_a_steered_module(site: str) -> None:
    model = tiny_model(num_hidden_layers=3)
    with torch.no_grad(), af.patch(model, scalars(model, site=site, layers=[0])):
        model(IDS)
        model.model.layers[2].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
        with pytest.raises(RuntimeError, match=r"layers.2.self_attn.o_proj was exchanged"):
            model(IDS)


def test_after_an_exchange_the_patch_comes_off_and_goes_on_again() -> None:
    model = tiny_model()
    one = scalars(model)
    applied = af.patch(model, one)
    new_attention(model)
    applied.remove()
    with af.patch(model, one):
        steered = logits(model)
    assert not torch.equal(steered, logits(model))


@pytest.mark.parametrize("shared", [shared_layer, shared_projection])
@pytest.mark.parametrize("site", ["head", "attn_out"])
def test_a_module_that_two_layers_share_is_refused(shared: Callable[[nn.Module], None], site: str) -> None:
    model = tiny_model()
    shared(model)
    with pytest.raises(ValueError, match="layers 0 and 1 share one module for the site"):
        af.ActivScalar.for_model(model, site=site)


def test_a_layer_that_runs_twice_in_a_pass_is_refused() -> None:
    model = tiny_model()
    inner = type(model.model).forward

    class Looping(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            kept = self.layers
            self._modules["layers"], self.config.num_hidden_layers = nn.ModuleList([*kept, *kept]), 4
            try:
                return inner(self, *args, **kwargs)
            finally:
                self._modules["layers"], self.config.num_hidden_layers = kept, 2

    model.model.__class__ = Looping
    for site in ("head", "residual"):
        with pytest.raises(ValueError, match="runs 2 times in a forward pass"):
            af.ActivScalar.for_model(model, site=site)


def test_lora_before_a_patch_is_steered_and_after_it_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    base = tiny_model(dtype=torch.float64)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    one = scalars(base)
    with torch.no_grad(), af.patch(wrapped, one):
        steered = wrapped(IDS).logits
    merged = copy.deepcopy(wrapped).merge_and_unload()
    with torch.no_grad(), af.patch(merged, one):
        torch.testing.assert_close(steered, merged(IDS).logits, rtol=1e-9, atol=1e-9)
    with torch.no_grad(), af.patch(base, one):
        later = peft.get_peft_model(base, config)
        with pytest.raises(RuntimeError, match=r"self_attn.o_proj was exchanged .* a Linear now"):
            later(IDS)


def deleted_layer(model: nn.Module) -> None:
    del model.model.layers[1]


def repeated_layer(model: nn.Module) -> None:
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3


def fused_attention(model: nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)


@pytest.mark.parametrize("change", [deleted_layer, repeated_layer, fused_attention])
def test_a_layer_that_goes_or_comes_and_a_forward_put_over_are_noticed(change: Callable[[nn.Module], None]) -> None:
    model = tiny_model()
    with torch.no_grad(), af.patch(model, scalars(model)):
        model(IDS)
        change(model)
        with pytest.raises(RuntimeError, match=r"was exchanged|was removed|the list of layers has"):
            model(IDS)


def test_an_mlp_that_is_not_steered_may_be_exchanged() -> None:
    model = tiny_model()
    with torch.no_grad(), af.patch(model, scalars(model, layers=[0])):
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)
        model(IDS)


def test_a_merge_is_checked_as_a_patch_is() -> None:
    model = tiny_model()
    one = scalars(model)
    shared_projection(model)
    with pytest.raises(ValueError, match="share"):
        af.merge(model, one)


def test_a_model_with_forwards_of_its_own_can_be_measured_under_a_patch() -> None:
    tokenizer = word_models.tokenizer()
    model = word_models.model_for(tokenizer)
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)  # as libraries that trace a model leave them
    with af.patch(model, af.ActivScalar.for_model(model)):
        found = af.perplexity(model, tokenizer, ["The capital of Spain"])
        layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
        with pytest.raises(RuntimeError, match=r"the forward of model.layers.0 .* was exchanged"):
            af.perplexity(model, tokenizer, ["The capital of Spain"])
    assert bool(found.isfinite().all())
