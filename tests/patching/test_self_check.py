"""The model itself is asked, once and without a trace, whether its sites are what their names say."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import CONFIGS, IDS, logits, scalars, tiny_model
from oracle.table import architectures
from oracle.tiny import tiny_model as tiny_architecture
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.architectures.site_check import verdict_of


def changed_before_projection(change: Any) -> nn.Module:
    """A Llama whose attention changes its heads before the projection gets them."""
    model = tiny_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        original = type(attention).forward

        class Changed(type(attention)):  # type: ignore[misc]
            def forward(self, *args: Any, inner: Any = original, **kwargs: Any) -> Any:
                projection, kept = self.o_proj, self.o_proj.forward
                # Not a hook: what stands between is a part of this attention, and hooks see what comes after it.
                projection.forward = lambda x: kept(x)
                self._modules["o_proj"] = Entering(projection, change)
                try:
                    return inner(self, *args, **kwargs)
                finally:
                    self._modules["o_proj"] = projection
                    projection.__dict__.pop("forward")

        attention.__class__ = Changed
    return model


class Entering(nn.Module):
    def __init__(self, projection: nn.Module, change: Any) -> None:
        super().__init__()
        self.__dict__["projection"], self.__dict__["change"] = projection, change

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.change(x))


def norm_over_all(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def norm_per_head(x: Tensor) -> Tensor:
    return F.layer_norm(x.unflatten(-1, (4, -1)), (8,)).flatten(-2)


def difference_of_pairs(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 2, -1))
    return torch.stack([heads[..., 0, :] - heads[..., 1, :]] * 2, -2).flatten(-3)


def widths_outside(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def turned(x: Tensor) -> Tensor:
    return x.roll(8, -1)


@pytest.mark.parametrize("change", [norm_over_all, norm_per_head, difference_of_pairs, widths_outside, turned])
def test_what_stands_between_heads_and_projection_is_found_whatever_it_is(change: Any) -> None:
    model = changed_before_projection(change)
    with pytest.raises(ValueError, match=r"site: 'head' at layer 0 of 'llama': something between its heads and the"):
        af.ActivScalar.for_model(model)
    for site in ("attn_out", "mlp_out", "residual"):
        af.ActivScalar.for_model(model, site=site, layers=[0])


def test_an_elementwise_gate_lets_head_factors_through() -> None:
    model = changed_before_projection(lambda x: x * torch.linspace(0.1, 2.0, x.shape[-1]))
    assert af.ActivScalar.for_model(model).alpha.shape == (2, 1, 4)


@pytest.mark.parametrize("family", ["bitnet", "diffllama"])
def test_known_families_with_something_between_are_refused_at_the_head_site_only(family: str) -> None:
    model = tiny_architecture(family, architectures()[family])
    for apply in (
        lambda: af.ActivScalar.for_model(model),
        lambda: af.SteerVec.for_model(model),
        lambda: af.head_mask(model, torch.ones(4)),
    ):
        with pytest.raises(ValueError, match="mixes or normalises them"):
            apply()
    assert af.ActivScalar.for_model(model, site="attn_out").alpha.shape[-1] == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3"])
def test_the_families_of_the_table_are_not_exempt(family: str, implementation: str) -> None:
    if family == "bloom" and implementation == "sdpa":
        implementation = "eager"  # it has no other
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    verdict = verdict_of(layout(model), "head")
    assert verdict is not None
    assert not verdict.reasons
    assert set(CONFIGS) >= {family}


def test_an_intervention_from_a_file_is_checked_where_it_is_applied(tmp_path: Any) -> None:
    scalars(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="something between its heads and the projection"):
        af.patch(changed_before_projection(norm_over_all), af.load_intervention(tmp_path))


# --- a site that cannot act ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "site"), [("gemma2", "attn_out"), ("olmo2", "mlp_out"), ("gemma3_text", "mlp_out")])
@pytest.mark.parametrize("kind", [af.ActivScalar, af.DynScalar])
def test_scalars_before_a_norm_without_scale_are_warned_of(family: str, site: str, kind: Any) -> None:
    with pytest.warns(UserWarning, match=rf"site: '{site}' of '{family}' cannot act at layers 0, 1: a norm follows"):
        kind.for_model(tiny_model(family), site=site)


@pytest.mark.parametrize(("family", "site"), [("llama", "attn_out"), ("gemma2", "head"), ("llama", "residual")])
def test_scalars_that_act_are_not_warned_of(family: str, site: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.ActivScalar.for_model(tiny_model(family), site=site, layers=[0])


def test_vectors_act_before_a_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.SteerVec.for_model(tiny_model("gemma2"), site="attn_out")


# --- the check disturbs nothing --------------------------------------------------------------------------------------


def test_the_check_runs_once_per_model_and_leaves_no_trace() -> None:
    model = tiny_model("qwen3")
    model.train()
    model.model.layers[1].eval()
    seen: list[str] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    calls: list[int] = []
    inner = type(model.model).forward

    class Counting(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(self, *args, **kwargs)

    model.model.__class__ = Counting
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for _ in range(3):
        one = af.ActivScalar.for_model(model)
        with af.patch(model, one), af.head_mask(model, torch.ones(4)):
            pass
    assert torch.equal(torch.rand(4), expected)
    assert not seen
    assert len(calls) == 1
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_check_compiles_nothing() -> None:
    made: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    torch.compiler.reset()
    model = tiny_model()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    call = torch.compile(model, backend=backend)
    af.ActivScalar.for_model(call)
    assert not made


def test_another_model_that_runs_in_between_is_not_touched() -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    expected = logits(other)
    said = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    inner = type(model.model.layers[0].mlp).forward

    class Nosy(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            said.append(logits(other))
            return inner(self, x)

    model.model.layers[0].mlp.__class__ = Nosy
    af.ActivScalar.for_model(model)
    assert said
    assert all(torch.equal(one, expected) for one in said)


def test_a_model_that_cannot_run_yet_is_checked_before_its_first_pass() -> None:
    right, wrong = tiny_model(), changed_before_projection(norm_over_all)
    for model in (right, wrong):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.to("meta")
        one = af.ActivScalar.for_model(model)
        applied = af.patch(model, one)
        model.to_empty(device="cpu")
        model.load_state_dict(kept)
        for name, buffer in tiny_model().named_buffers():
            model.get_buffer(name).copy_(buffer)
        if model is right:
            assert torch.equal(logits(model), logits(tiny_model()))
        else:
            with pytest.raises(ValueError, match="something between its heads and the projection"):
                logits(model)
        applied.remove()


def test_the_environment_skips_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSCALE_CHECK", "0")
    model = changed_before_projection(norm_over_all)
    with af.patch(model, scalars(model)):
        logits(model)


def test_a_pass_that_fails_names_the_model_and_how_to_skip_the_check() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = nn.Linear(7, 7)
    with pytest.raises(
        ValueError, match=r"verifies the structure of LlamaModel failed: .*set ACTSCALE_CHECK=0 to skip the check"
    ):
        af.ActivScalar.for_model(model)


def test_a_check_inside_a_patch_sees_the_model_as_it_is_without_it() -> None:
    model = tiny_model()
    one = scalars(model)
    with af.patch(model, one, strength=torch.tensor([1.0, -1.0, 0.5])):
        expected = logits(model)
        af.SteerVec.for_model(model, site="mlp_out")
        assert torch.equal(logits(model), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, IDS), logits(model, IDS))


def test_a_check_that_had_to_wait_and_fails_fails_again() -> None:
    model = changed_before_projection(norm_over_all)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    one = scalars(tiny_model())
    model.to("meta")
    with af.patch(model, one):
        model.to_empty(device="cpu")
        model.load_state_dict(kept)
        for name, buffer in tiny_model().named_buffers():
            model.get_buffer(name).copy_(buffer)
        for _ in range(2):
            with pytest.raises(ValueError, match="something between its heads and the projection"):
                logits(model)


def test_a_verdict_is_of_the_modules_that_it_was_found_on() -> None:
    model = tiny_model()
    one = af.ActivScalar.for_model(model)
    model.model.layers[0].self_attn.__class__ = type(changed_before_projection(norm_over_all).model.layers[0].self_attn)
    with pytest.raises(ValueError, match="something between its heads and the projection"):
        af.patch(model, one)


def test_a_merge_at_a_site_that_is_refused_is_refused() -> None:
    one = scalars(tiny_model())
    with pytest.raises(ValueError, match="something between its heads and the projection"):
        af.merge(changed_before_projection(norm_over_all), one)
