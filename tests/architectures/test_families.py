"""Every family of the table: editing a site by patch equals changing the weights that produce it by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import CONFIGS, tiny_model
from oracle.tiny import tiny_model as tiny_architecture
from torch import Tensor, nn

from actscale_fast.architectures.families import FAMILIES
from actscale_fast.architectures.layout import layout
from actscale_fast.interventions import ActivScalar
from actscale_fast.patching.merge import merge, unmerge
from actscale_fast.patching.patch import patch

IDS = torch.tensor([[5, 9, 12, 7, 30, 2], [8, 8, 41, 3, 19, 60]])
#: The last projection of each family's MLP in a layer; experts keep theirs in one tensor [E, hidden, inner].
DOWN = {
    "mixtral": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "phi": "mlp.fc2",
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt_neo": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "bloom": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "mpt": "ffn.down_proj",
    "starcoder2": "mlp.c_proj",
}
#: Projections of attention, written down once more so that a wrong row of the table cannot agree with itself.
OUT = {
    "phi": "self_attn.dense",
    "gpt2": "attn.c_proj",
    "gptj": "attn.out_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "mpt": "attn.out_proj",
}


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def random_scalars(model: nn.Module, site: str, **kwargs: object) -> ActivScalar:
    intervention = ActivScalar.for_model(model, site=site, **kwargs)
    with torch.no_grad():
        intervention.alpha.copy_(torch.randn(intervention.alpha.shape, generator=torch.Generator().manual_seed(3)))
        if site in ("attn_out", "mlp_out"):  # Gemma 2, Gemma 3 and OLMo 2 norm what follows: only a sign gets through
            intervention.alpha.copy_(-1.5 - intervention.alpha.abs())
    return intervention


def assert_same_effect(model: nn.Module, changed: nn.Module, intervention: ActivScalar) -> None:
    before = logits(model)
    with patch(model, intervention):
        patched = logits(model)
    expected = logits(changed)
    assert (expected - before).abs().max() > 1e-3, "the change by hand does nothing, so it proves nothing"
    torch.testing.assert_close(patched, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(model), before)


def scale_output(module: nn.Module, scale: float) -> None:
    """Scale everything a linear layer, a Conv1D or a block of experts returns, in its weights."""
    with torch.no_grad():
        if hasattr(module, "weight"):
            module.weight.mul_(scale)
            if module.bias is not None:
                module.bias.mul_(scale)
        else:
            module.down_proj.mul_(scale)


def test_the_table_and_the_zoo_hold_the_same_families() -> None:
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scaling_heads_equals_scaling_the_projections_input_columns(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    intervention = random_scalars(model, "head")
    changed = copy.deepcopy(model)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(layers_of(changed)):
        weight = layer.get_submodule(OUT.get(family, "self_attn.o_proj")).weight.data
        for head in range(config.num_attention_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            inputs = weight[part] if family == "gpt2" else weight[:, part]  # Conv1D keeps its inputs as rows
            inputs *= 1 + intervention.alpha[index, 0, head].item()
    assert_same_effect(model, changed, intervention)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scaling_attn_out_equals_scaling_the_projections_weight_and_bias(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    intervention = random_scalars(model, "attn_out")
    changed = copy.deepcopy(model)
    for index, layer in enumerate(layers_of(changed)):
        scale_output(layer.get_submodule(OUT.get(family, "self_attn.o_proj")), 1 + intervention.alpha[index, 0].item())
    assert_same_effect(model, changed, intervention)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scaling_mlp_out_equals_scaling_the_down_projections_weight_and_bias(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    intervention = random_scalars(model, "mlp_out")
    changed = copy.deepcopy(model)
    for index, layer in enumerate(layers_of(changed)):
        scale_output(layer.get_submodule(DOWN.get(family, "mlp.down_proj")), 1 + intervention.alpha[index, 0].item())
    assert_same_effect(model, changed, intervention)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scaling_the_residual_equals_scaling_what_the_next_layer_is_given(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    intervention = random_scalars(model, "residual", layers=[0])
    changed = copy.deepcopy(model)
    scale = 1 + intervention.alpha[0, 0].item()
    layers_of(changed)[1].register_forward_pre_hook(lambda _, args: (args[0] * scale, *args[1:]))
    assert_same_effect(model, changed, intervention)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaling_the_last_residual_is_invisible_behind_a_scale_free_norm(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    norm = model.base_model.norm if family == "llama" else model.base_model.ln_f
    setattr(norm, "variance_epsilon" if family == "llama" else "eps", 1e-300)
    intervention = ActivScalar.for_model(model, site="residual", layers=[-1])
    torch.nn.init.constant_(intervention.alpha, 1.5)
    before = logits(model)
    with patch(model, intervention):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # the norm itself works in float32


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_layout_names_the_models_sizes_and_projections(family: str) -> None:
    model = tiny_model(family)
    found = layout(model)
    assert (found.n_layers, found.n_heads, found.hidden_size) == (2, 4, 32)
    assert found.max_context == (None if family == "bloom" else 64)
    assert found.projections == tuple(
        layer.get_submodule(OUT.get(family, "self_attn.o_proj")) for layer in layers_of(model)
    )


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"mixtral", "qwen3_moe"}))
def test_merging_equals_patching_and_unmerging_restores_every_bit(family: str, site: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    intervention = random_scalars(model, site)
    with patch(model, intervention, strength=-0.5):
        patched = logits(model)
    merge(model, intervention, strength=-0.5)
    torch.testing.assert_close(logits(model), patched, rtol=1e-9, atol=1e-9)
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_a_bare_base_model_takes_the_same_intervention(family: str) -> None:
    model = tiny_model(family)
    intervention = random_scalars(model, "head")
    with torch.no_grad():
        with patch(model, intervention):
            expected = model.base_model(input_ids=IDS)[0]
        with patch(model.base_model, intervention):
            assert torch.equal(model.base_model(input_ids=IDS)[0], expected)


def test_head_dim_comes_from_the_config_where_it_has_one() -> None:
    assert layout(tiny_model("qwen3")).head_dim == 10
    assert layout(tiny_model("llama")).head_dim == 8


def test_an_unlisted_family_is_found_by_its_structure() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    listed = random_scalars(model, "head")
    with patch(model, listed):
        expected = logits(model)
    model.config.model_type = "newcomer"
    found = layout(model)
    assert (found.projection, found.mlp, found.layers[1]) == ("self_attn.o_proj", "mlp", model.model.layers[1])
    with patch(model, random_scalars(model, "head")):
        assert torch.equal(logits(model), expected)


def test_an_uncertain_family_is_refused_and_the_error_says_how_to_name_the_projection() -> None:
    model = tiny_model("llama")
    model.config.model_type = "newcomer"
    for layer in model.model.layers:
        layer.extra = nn.Module()
        layer.extra.dense = nn.Linear(32, 32)
    with pytest.raises(
        ValueError, match=r"'newcomer' is not known.*extra.dense, self_attn.o_proj.*projection='self_attn.o_proj'"
    ):
        ActivScalar.for_model(model)
    named = random_scalars(model, "head", projection="self_attn.o_proj")
    before = logits(model)
    with patch(model, named):  # the name is kept with the intervention
        assert not torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=r"no layer \(LlamaDecoderLayer\) has a module 'self_attn.nothing'"):
        ActivScalar.for_model(model, projection="self_attn.nothing")
    with pytest.raises(ValueError, match=r"layers_path: LlamaForCausalLM has no module 'model.blocks'"):
        ActivScalar.for_model(model, layers_path="model.blocks")


def test_an_mlp_that_may_add_the_residual_itself_is_not_guessed() -> None:
    model = tiny_model("mpt")
    model.config.model_type = "newcomer"
    with pytest.raises(ValueError, match=r"'mlp_out' of 'newcomer' is not certain"):
        ActivScalar.for_model(model, site="mlp_out")
    assert ActivScalar.for_model(model, site="mlp_out", mlp="ffn.down_proj").location.paths == {"mlp": "ffn.down_proj"}


def test_a_layer_without_attention_is_left_out_or_refused_by_number() -> None:
    model = tiny_architecture("qwen3_next", "Qwen3NextForCausalLM")
    assert ActivScalar.for_model(model).location.layers == (1, 3)
    with pytest.raises(ValueError, match=r"layer 2 \(Qwen3NextDecoderLayer\) has no attention 'self_attn.o_proj'"):
        ActivScalar.for_model(model, layers=[1, 2])


def test_models_that_are_no_causal_language_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model: got str, expected a Hugging Face causal language model"):
        layout("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: got Linear, expected a Hugging Face model with a config"):
        layout(nn.Linear(2, 2))
    model = tiny_model("bloom")
    model.config.pretraining_tp, model.config.slow_but_exact = 2, True
    with pytest.raises(ValueError, match="slow_but_exact computes the projections outside their modules"):
        layout(model)
