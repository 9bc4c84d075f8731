"""TransformerLens: hooks that equal `af.patch` on the model inside the bridge, sweeps that equal its own functions."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import pytest
import tiny
import torch
from model_zoo import IDS, SITES, randomised, scalars, tiny_model
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig, patching
from transformer_lens.model_bridge.sources import build_bridge_from_module

import actscale_fast as af
from actscale_fast.das.boundless_das import BoundlessDAS
from actscale_fast.integrations.transformer_lens import for_transformer_lens, head_patching, head_scaling, hooks

FAMILIES = ["llama", "gpt2", "gemma2", "granite", "bloom", "opt", "mistral"]
STRENGTHS = torch.tensor([1.0, -0.5, 0.25])


def bridge(model: Any) -> Any:
    """A bridge around a copy of a Hugging Face model, without a tokenizer."""
    inner = copy.deepcopy(model)
    inner.set_attn_implementation("eager")
    return build_bridge_from_module(inner, type(model).__name__, hf_config=inner.config).eval()


def steered(model: Any, intervention: af.Intervention, strength: float | Tensor = 1.0, **kwargs: Any) -> Tensor:
    with torch.no_grad(), af.patch(model, intervention, strength, **kwargs):
        return model(IDS).logits


def hooked(model: Any, intervention: af.Intervention, strength: float | Tensor = 1.0, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(IDS, fwd_hooks=hooks(model, intervention, strength, **kwargs))


def same(found: Tensor, expected: Tensor) -> None:
    """Equal but for the other order of sums in the attentions that TransformerLens computes itself."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def multiplied(factor: Tensor, x: Tensor, hook: Any) -> Tensor:
    return x * factor


def clean_and_corrupted(model: Any) -> tuple[Any, Tensor]:
    corrupted = IDS.clone()
    corrupted[:, 2] = torch.tensor([7, 9, 3])
    with torch.no_grad():
        return model.run_with_cache(IDS)[1], corrupted


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_do_what_a_patch_does_at_every_site_row_by_row(family: str, positions: list[int] | None) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    lens = bridge(model)
    for site in SITES:
        for kind in (af.ActivScalar, af.SteerVec):
            intervention = randomised(kind.for_model(model, site=site, positions=positions))
            same(hooked(lens, intervention, STRENGTHS), steered(model, intervention, STRENGTHS))


def test_dynamic_scalars_stacks_and_composites_do_the_same() -> None:
    model = tiny_model("llama")
    lens = bridge(model)
    dynamic = randomised(af.DynScalar.for_model(model), scale=0.1)
    same(hooked(lens, dynamic), steered(model, dynamic))
    stack, group = af.ActivScalar.stack([scalars(model, 1), scalars(model, 2)]), torch.tensor([1, 0, 1])
    same(hooked(lens, stack, 0.5, group=group), steered(model, stack, 0.5, group=group))
    both = 2.0 * scalars(model, 3, positions=[-1]) - randomised(af.SteerVec.for_model(model, site="residual"))
    same(hooked(lens, both, STRENGTHS), steered(model, both, STRENGTHS))


def test_strength_zero_changes_no_bit_and_dropped_hooks_leave_nothing() -> None:
    lens = bridge(tiny_model("llama"))
    decoder = lens.original_model.model
    before, kind, hooks_before = lens(IDS), type(decoder), len(decoder._forward_pre_hooks)
    intervention = scalars(tiny_model("llama"), positions=[0, -1])
    assert torch.equal(hooked(lens, intervention, 0.0), before)
    found = hooks(lens, intervention)
    with torch.no_grad(), lens.hooks(fwd_hooks=found):
        assert not torch.equal(lens(IDS), before)
    assert type(decoder) is not kind
    del found
    gc.collect()
    assert type(decoder) is kind
    assert len(decoder._forward_pre_hooks) == hooks_before
    assert torch.equal(lens(IDS), before)


def test_scalars_get_the_gradients_that_they_get_from_a_patch() -> None:
    model = tiny_model("llama").requires_grad_(False)
    lens, intervention = bridge(model), scalars(model)
    lens.run_with_hooks(IDS, fwd_hooks=hooks(lens, intervention)).square().mean().backward()
    found, intervention.alpha.grad = intervention.alpha.grad, None
    with af.patch(model, intervention):
        model(IDS).logits.square().mean().backward()
    assert found is not None
    torch.testing.assert_close(found, intervention.alpha.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", [{}, {"positions": [0, -1]}, {"positions": [1], "generated": True}])
def test_generation_with_a_cache_and_left_padding_steers_the_same_tokens(where: dict[str, Any]) -> None:
    model = tiny.llama()
    lens, intervention = bridge(model), scalars(model, **where)
    ids = torch.tensor([[4, 5, 6, 8, 7], [1, 1, 6, 8, 7]])
    mask = (ids != 1).long()
    with torch.no_grad(), af.patch(model, intervention):
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    options |= {"return_type": "tokens", "verbose": False}
    uncached = lens.generate(ids, use_past_kv_cache=False, **options)
    keeps_its_cache = torch.equal(lens.generate(ids, **options), uncached)
    with lens.hooks(fwd_hooks=hooks(lens, intervention)):
        if keeps_its_cache:
            assert torch.equal(lens.generate(ids, **options), expected)
        elif not where:  # TransformerLens 4.3 loses its cache on transformers 5.24, which gave it another name
            assert torch.equal(lens.generate(ids, use_past_kv_cache=False, **options), expected)
        else:
            with pytest.raises(ValueError, match="has the caller lost its cache"):
                lens.generate(ids, **options)


def test_processed_weights_are_refused_where_they_move_the_site_and_taken_where_they_do_not() -> None:
    for family, refused in (("gpt2", SITES), ("qwen2", ["head"]), ("llama", [])):
        model = tiny_model(family)
        lens = bridge(model)
        lens.enable_compatibility_mode(disable_warnings=True)
        for site in SITES:
            intervention = randomised(af.ActivScalar.for_model(model, site=site))
            if site in refused:
                with pytest.raises(ValueError, match="weights processed by TransformerLens"):
                    hooks(lens, intervention)
            else:  # folding norms into the weights rounds them anew; only the difference of two logits keeps its value
                found, expected = hooked(lens, intervention), steered(model, intervention)
                found, expected = found - found[..., :1], expected - expected[..., :1]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_intervention_for_processed_weights_scales_the_heads_that_are_there() -> None:
    lens = bridge(tiny_model("gpt2"))
    lens.enable_compatibility_mode(disable_warnings=True)
    intervention = randomised(for_transformer_lens(lens, layers=[-1]))

    def plain(z: Tensor, hook: Any) -> Tensor:
        return z * (1 - 0.5 * intervention.alpha[0, 0])[:, None]

    with torch.no_grad():
        expected = lens.run_with_hooks(IDS, fwd_hooks=[("blocks.1.attn.hook_z", plain)])
    torch.testing.assert_close(hooked(lens, intervention, -0.5), expected)


def test_transformer_lens_own_models_take_interventions_without_positions() -> None:
    config = TransformerBridgeConfig(
        d_model=32, d_head=8, n_layers=2, n_ctx=16, n_heads=4, d_vocab=61, d_mlp=48, act_fn="gelu", seed=0,
    )  # fmt: skip
    lens = TransformerBridge.boot_native(config).eval()
    for site, name in (("head", "attn.hook_z"), ("residual", "hook_resid_post"), ("mlp_out", "hook_mlp_out")):
        intervention = randomised(for_transformer_lens(lens, site=site))
        factors = 1 + intervention.alpha.detach()  # [L, 1, H]
        factors = factors[:, 0, :, None] if site == "head" else factors
        expected = [(f"blocks.{i}.{name}", functools.partial(multiplied, factors[i])) for i in range(2)]
        with torch.no_grad():
            torch.testing.assert_close(hooked(lens, intervention), lens.run_with_hooks(IDS, fwd_hooks=expected))
    with pytest.raises(ValueError, match="positions: this bridge's model is not of Hugging Face"):
        hooks(lens, for_transformer_lens(lens, positions=[0]))


def test_a_module_that_a_path_names_is_refused_unless_it_is_the_familys_own() -> None:
    model = tiny_model("gemma2")
    lens = bridge(model)
    named = randomised(af.ActivScalar.for_model(model, site="mlp_out", mlp="post_feedforward_layernorm"))
    with pytest.raises(ValueError, match="is the module 'post_feedforward_layernorm', but TransformerLens may"):
        hooks(lens, named)
    own = randomised(af.SteerVec.for_model(model, site="mlp_out", mlp="mlp"))
    same(hooked(lens, own), steered(model, own))


def test_what_cannot_be_is_refused_by_name() -> None:
    model = tiny_model("llama")
    lens = bridge(model)
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM, expected a TransformerBridge"):
        hooks(model, scalars(model))
    with pytest.raises(ValueError, match="made for another model: model_type 'gpt2'"):
        hooks(lens, scalars(tiny_model("gpt2")))
    with pytest.raises(TypeError, match="BoundlessDAS needs the activations of a source"):
        hooks(lens, BoundlessDAS.for_model(model, site="residual", layers=[0], positions=[-1]))
    broken = scalars(model)
    with torch.no_grad():
        broken.alpha[0, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="alpha: 1 of 8 values are not finite"):
        hooks(lens, broken)
    with pytest.raises(ValueError, match="strength: got inf, expected a finite number"):
        hooks(lens, scalars(model), float("inf"))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_patching_gives_the_numbers_of_transformer_lens(family: str, rows: int) -> None:
    lens = bridge(tiny_model(family))
    cache, corrupted = clean_and_corrupted(lens)
    expected = patching.get_act_patch_attn_head_out_all_pos(lens, corrupted, cache, metric)
    assert expected.std() > 1e-3
    torch.testing.assert_close(head_patching(lens, corrupted, cache, metric, rows=rows), expected, rtol=1e-5, atol=5e-6)


def test_head_patching_takes_queries_keys_values_and_positions() -> None:
    lens = bridge(tiny_model("llama", num_hidden_layers=3))
    cache, corrupted = clean_and_corrupted(lens)
    for name in "qkv":
        stock = getattr(patching, f"get_act_patch_attn_head_{name}_all_pos")(lens, corrupted, cache, metric)
        torch.testing.assert_close(
            head_patching(lens, corrupted, cache, metric, activation=name), stock, rtol=1e-5, atol=5e-6
        )
    stock = patching.get_act_patch_attn_head_out_by_pos(lens, corrupted, cache, metric)
    assert stock.shape == (3, 6, 4)
    found = head_patching(lens, corrupted, cache, metric, positions=True, rows=16)
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=5e-6)


def test_head_scaling_is_a_patch_of_one_head_at_a_time() -> None:
    model = tiny_model("llama")
    found = head_scaling(bridge(model), IDS, metric, factor=-0.5, rows=6)
    for layer in range(2):
        for head in range(4):
            one = af.ActivScalar.for_model(model)
            with torch.no_grad():
                one.alpha[layer, 0, head] = -1.5
            torch.testing.assert_close(found[layer, head], metric(steered(model, one)), rtol=1e-5, atol=5e-6)


def test_layers_below_the_patched_one_run_once() -> None:
    lens = bridge(tiny_model("llama", num_hidden_layers=3))
    cache, corrupted = clean_and_corrupted(lens)
    calls = [0, 0, 0]
    for layer, block in enumerate(lens.blocks):
        block.original_component.register_forward_hook(lambda *_, at=layer: calls.__setitem__(at, calls[at] + 1))
    head_patching(lens, corrupted, cache, metric, rows=6)  # 2 batches of 2 heads a layer
    assert calls == [1 + 2, 1 + 4, 6]


def test_a_failing_metric_leaves_the_model_as_it_was() -> None:
    lens = bridge(tiny_model("llama"))
    cache, corrupted = clean_and_corrupted(lens)
    before = lens(IDS)
    with pytest.raises(ValueError, match="metric: returned shape \\(3,\\), expected a scalar"):
        head_patching(lens, corrupted, cache, lambda logits: logits[:, -1, 0])

    def failing(logits: Tensor) -> Tensor:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls > 5:  # type: ignore[attr-defined]
            raise RuntimeError("enough")
        return metric(logits)

    failing.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="enough"):
        head_patching(lens, corrupted, cache, failing)
    assert all("forward" not in block.__dict__ for block in lens.blocks)
    assert torch.equal(lens(IDS), before)
    lens.train()
    with pytest.raises(ValueError, match="model: is in training mode"):
        head_patching(lens, corrupted, cache, metric)
    with pytest.raises(ValueError, match="activation: got 'pattern', expected one of z, q, k, v"):
        head_patching(lens, corrupted, cache, metric, activation="pattern")


@pytest.mark.real_model
def test_the_real_model_is_steered_and_swept_alike(demo_model: tuple[Any, Any]) -> None:
    model, tokenizer = demo_model
    ids = tokenizer("The capital of Germany is Paris. Q: What is the capital of Germany? A:", return_tensors="pt")
    lens = bridge(model)
    intervention = randomised(af.ActivScalar.for_model(model), scale=0.2)
    with torch.no_grad():
        with af.patch(model, intervention):
            expected = model(**ids).logits
        found = lens.run_with_hooks(ids["input_ids"], fwd_hooks=hooks(lens, intervention))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        swept = head_scaling(lens, ids["input_ids"], lambda logits: logits[0, -1].max(), rows=9)
        for layer, head in ((29, 0), (4, 7)):
            alpha = af.ActivScalar.for_model(model, layers=[layer])
            alpha.alpha[0, 0, head] = -1.0
            with af.patch(model, alpha):
                torch.testing.assert_close(swept[layer, head], model(**ids).logits[0, -1].max(), rtol=1e-3, atol=1e-3)
