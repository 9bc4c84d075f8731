"""DynScalar in a model: against hooks written by hand, at every length, and with a penalty on what it produces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import TokenExamples, engine
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.families import FAMILIES
from actscale_fast.architectures.layout import layout
from actscale_fast.interventions import produced_l1

IDS = torch.tensor([[5, 9, 12, 7, 30, 2], [8, 8, 41, 3, 19, 60]])
SITES = ("head", "attn_out", "mlp_out", "residual")


def by_hand(model: Any, found: Any, dyn: af.DynScalar, strength: float, only: Tensor | None = None) -> list[Any]:
    """Hooks of plain PyTorch: h·(1 + β·⟨u, h⟩) on each chosen layer; `only` bool [B, T] says where."""
    where = dyn.location

    def change(value: Tensor, probe: Tensor) -> Tensor:
        heads = value.unflatten(-1, (where.n_heads, where.width))
        alpha = (heads * probe[0]).sum(-1, keepdim=True)
        if only is not None:
            alpha = alpha * only[:, :, None, None]
        return (heads * (1 + strength * alpha)).flatten(-2)

    handles = []
    for probe, layer in zip(dyn.probes.detach(), where.layers, strict=True):
        module = found.site_module(where.site, layer)
        if where.site == "head":
            handles.append(module.register_forward_pre_hook(lambda _, a, p=probe: (change(a[0], p), *a[1:])))
        else:

            def after(_: Any, __: Any, out: Any, p: Tensor = probe) -> Any:
                return (change(out[0], p), *out[1:]) if isinstance(out, tuple) else change(out, p)

            handles.append(module.register_forward_hook(after))
    return handles


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("site", SITES)
def test_patched_logits_are_those_of_hooks_written_by_hand(family: str, site: str) -> None:
    model = tiny_model(family)
    dyn = randomised(af.DynScalar.for_model(model, site=site, layers=[1, 0]))
    assert isinstance(dyn, af.DynScalar)
    with torch.no_grad():
        handles = by_hand(model, layout(model), dyn, -0.7)
        expected = model(IDS).logits
        for handle in handles:
            handle.remove()
        with af.patch(model, dyn, strength=-0.7):
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_takes_dynamic_scalars_and_is_left_as_it_was(family: str) -> None:
    model = tiny_model(family)
    dyn = randomised(af.DynScalar.for_model(model))
    with torch.no_grad():
        before = model(IDS).logits
        with af.patch(model, dyn):
            assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
        assert torch.equal(model(IDS).logits, before)


def test_listed_positions_share_the_probe_and_leave_other_tokens_alone() -> None:
    model = tiny_model("llama")
    dyn = randomised(af.DynScalar.for_model(model, positions=[1, -1]))
    assert tuple(dyn.probes.shape) == (2, 1, 4, 8)
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.int64), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, 0] = 0
    only = torch.zeros(2, 6, dtype=torch.bool)
    only[:, [1, 5]] = True
    with torch.no_grad():
        handles = by_hand(model, layout(model), dyn, 1.0, only)
        expected = model(IDS).logits
        for handle in handles:
            handle.remove()
        with af.patch(model, dyn):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
            found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [None, [0, 2]])
def test_rows_use_their_own_probes_of_a_stack(positions: list[int] | None) -> None:
    model = tiny_model("llama")
    parts = [randomised(af.DynScalar.for_model(model, positions=positions), seed=seed) for seed in (1, 2)]
    stacked = af.stack(parts)
    with torch.no_grad():
        with af.patch(model, stacked, group=torch.tensor([1, 0])):
            found = model(IDS).logits
        for row, part in enumerate(reversed(parts)):
            with af.patch(model, part):
                torch.testing.assert_close(found[row], model(IDS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)


def test_a_stack_of_one_needs_no_group() -> None:
    model = tiny_model("llama")
    part = randomised(af.DynScalar.for_model(model, positions=[0, 2]))
    with torch.no_grad():
        with af.patch(model, part):
            expected = model(IDS).logits
        with af.patch(model, af.stack([part])):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_generation_with_padding_and_cache_is_that_of_recomputing_every_token() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    dyn = randomised(af.DynScalar.for_model(model, positions=[-1], generated=True), scale=0.3)
    texts = ["The capital of A is", "what is"]
    batch = tokens(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad(), af.patch(model, dyn, strength=1.5) as patched:
        found = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, -6:]
        for row, text in enumerate(texts):
            ids = tokens(text, return_tensors="pt").input_ids
            length = ids.shape[1]
            for _ in range(6):
                with patched.prompt(length):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert ids[0, length:].tolist() == found[row].tolist()


def test_what_is_saved_steers_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dyn = randomised(af.DynScalar.for_model(model, site="mlp_out", layers=[0]))
    dyn.save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    with torch.no_grad(), af.patch(model, dyn):
        expected = model(IDS).logits
    with torch.no_grad(), af.patch(model, loaded):
        assert torch.equal(model(IDS).logits, expected)


def penalised_by_hand(model: Any, data: TokenExamples, dyn: af.DynScalar, positions: tuple[int, ...] | None) -> Tensor:
    """Mean over prompts and directions of Σ_layers,heads mean_t |⟨u, h_t⟩|, from hooks on unpadded prompts."""
    found, total = layout(model), torch.zeros((), dtype=torch.float64)
    for prompt in data.prompts:
        for sign in (1.0, -1.0):
            made: list[Tensor] = []

            def change(_: Any, inputs: Any, sign: float = sign, made: list[Tensor] = made) -> Any:
                heads = inputs[0].unflatten(-1, (4, 8))
                alpha = (heads * dyn.probes[len(made), 0]).sum(-1)  # [1, T, H]
                steered = torch.zeros(heads.shape[1], dtype=torch.bool)
                steered[list(range(heads.shape[1]) if positions is None else positions)] = True
                made.append(alpha[0, steered].abs().sum(-1).mean())
                return ((heads * (1 + sign * alpha * steered[:, None]).unsqueeze(-1)).flatten(-2),)

            handles = [module.register_forward_pre_hook(change) for module in found.projections]
            model(torch.tensor([prompt]))
            for handle in handles:
                handle.remove()
            total = total + torch.stack(made).sum().double()
    return total / (2 * len(data.prompts))


@pytest.mark.parametrize("positions", [None, (0, -1)])
def test_the_penalty_on_produced_scalars_has_the_value_and_gradient_of_the_formula(
    positions: tuple[int, ...] | None,
) -> None:
    model, data = tiny_model("llama"), TokenExamples()
    dyn = randomised(af.DynScalar.for_model(model, positions=positions), scale=0.2)
    assert isinstance(dyn, af.DynScalar)
    without = af.Objective(minimality=0.0)
    with_it = af.Objective(minimality=0.7, sparsity="scalars")
    _, (plain,) = engine(model, data, dyn, without)
    from actscale_fast.learning.engine import Engine, FitRequest

    with Engine(model, data, dyn, [with_it]) as opened:
        terms, (gradient,) = opened.gradients([FitRequest(range(len(data)), with_it)])
    model.requires_grad_(False)
    expected = penalised_by_hand(model, data, dyn, positions)
    (wanted,) = torch.autograd.grad(0.7 * expected, [dyn.probes])
    torch.testing.assert_close(terms[0, 2].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient - plain, wanted, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))


def test_the_penalty_makes_the_produced_scalars_smaller() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    examples = [af.Example("The capital of A is", " Rome", " Oslo"), af.Example("what is B", " Paris", " one")]
    ends = {}
    for weight in (0.0, 0.5):
        dyn = af.DynScalar.for_model(model)
        objective = af.Objective(margin=4.0, minimality=weight, sparsity="scalars")
        result = af.fit(model, tokens, examples, dyn, objective, steps=25, lr=0.05, progress=False)
        ends[weight] = result.history[-1]["minimality"]
        assert result.history[-1]["effectiveness"] < result.history[0]["effectiveness"]
    assert ends[0.5] < 0.7 * ends[0.0]


def test_sparsity_of_scalars_is_refused_where_none_are_produced() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    examples = [af.Example("The capital of A is", " Rome", " Oslo")]
    objective = af.Objective(sparsity="scalars")
    with pytest.raises(ValueError, match="requires a DynScalar, which produces them; got a ActivScalar"):
        af.fit(model, tokens, examples, af.ActivScalar.for_model(model), objective, progress=False)
    with pytest.raises(ValueError, match="sparsity: got 'u', expected 'parameters' or 'scalars'"):
        af.Objective(sparsity="u")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noted: got no layer"):
        produced_l1([])


def test_what_was_learned_on_one_length_is_evaluated_on_another() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    short = [af.Example("The capital of A is", " Rome", " Oslo"), af.Example("The capital of B is", " Oslo", " Rome")]
    longer = [af.Example("answer in one : " + example.prompt, example.correct, example.wrong) for example in short]
    dyn = af.DynScalar.for_model(model)
    af.fit(model, tokens, short, dyn, af.Objective(minimality=0.0), steps=40, lr=0.1, progress=False)
    for examples in (short, longer):
        evaluation = af.evaluate(model, tokens, examples, dyn)
        assert evaluation.baseline is not None
        assert evaluation.logit_difference > evaluation.baseline.logit_difference
