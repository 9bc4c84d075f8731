"""Merging: the numbers of patching, in the weights; unmerging puts back every bit; refusals change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import randomised, tiny_model
from torch import Tensor, nn

from actscale_fast.interventions import ActivScalar, Intervention, SteerVec
from actscale_fast.patching.merge import merge, unmerge
from actscale_fast.patching.patch import patch

IDS = torch.tensor([[5, 9, 12, 7, 30, 2]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "bloom"])
def test_a_steering_vector_goes_into_the_bias(family: str, site: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    before = weights(model)
    vectors = randomised(SteerVec.for_model(model, site=site))
    with patch(model, vectors, strength=-0.5):
        expected = logits(model)
    merge(model, vectors, strength=-0.5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    unmerge(model)
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unmerging_restores_removed_heads_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = weights(model)
    intervention = ActivScalar.for_model(model)
    with torch.no_grad():
        intervention.alpha[:, :, :2] = -1.0  # 1 + α = 0: dividing could not bring these heads back
        intervention.alpha[:, :, 2] = 1 / 3
    merge(model, intervention)
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert not weight[:, :16].any()
    exact = before["model.layers.0.self_attn.o_proj.weight"][:, 16:24].double() * (
        1 + intervention.alpha[0, 0, 2].double()
    )
    error = (weight[:, 16:24].double() - exact).abs()
    # One rounding to the dtype after two in float32 (1 + α, and the product).
    bound = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
    assert (error <= exact.abs() * bound + torch.finfo(dtype).smallest_normal).all()
    unmerge(model)
    assert same(model, before)


def test_merged_weights_are_seen_by_a_copy_which_can_be_unmerged_itself() -> None:
    model = tiny_model("llama")
    before = logits(model)
    merge(model, randomised(ActivScalar.for_model(model)))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    unmerge(twin)
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model), before)
    unmerge(model)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_merging_twice_and_unmerging_nothing_are_refused() -> None:
    model = tiny_model("llama")
    before = weights(model)
    intervention = randomised(ActivScalar.for_model(model))
    with pytest.raises(ValueError, match="no intervention is merged"):
        unmerge(model)
    merge(model, intervention)
    with pytest.raises(ValueError, match="an intervention is merged already; unmerge it first"):
        merge(model, intervention)
    unmerge(model)
    with pytest.raises(ValueError, match="no intervention is merged"):
        unmerge(model)
    assert same(model, before)


@pytest.mark.parametrize(
    ("cls", "family", "where", "message"),
    [
        (ActivScalar, "llama", {"positions": [0]}, "it has positions, but weights act on every token; use patch"),
        (ActivScalar, "llama", {"site": "residual"}, "no single weight produces the residual stream"),
        (ActivScalar, "mixtral", {"site": "mlp_out"}, "layer 0's MLP .* does not end in one known projection"),
        (SteerVec, "gpt2", {"site": "head"}, "adds to a bias, but the head site has no bias"),
        (SteerVec, "llama", {"site": "mlp_out"}, "adds to a bias, but model.layers.0.mlp.down_proj has no bias"),
    ],
)
def test_what_weights_cannot_express_is_refused(
    cls: type[Intervention], family: str, where: dict[str, object], message: str
) -> None:
    model = tiny_model(family)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        merge(model, randomised(cls.for_model(model, **where)))  # type: ignore[arg-type]
    assert same(model, before)


def test_bad_arguments_are_refused_and_change_nothing() -> None:
    model = tiny_model("llama")
    before = weights(model)
    intervention = randomised(ActivScalar.for_model(model))
    with pytest.raises(ValueError, match="strength: got one value per row"):
        merge(model, intervention, torch.ones(2))  # type: ignore[arg-type]
    for wrong in (None, [1.0], "x", "1"):
        with pytest.raises(TypeError, match=f"strength: got {type(wrong).__name__}, expected one number"):
            merge(model, intervention, strength=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength: got inf"):
        merge(model, intervention, float("inf"))
    with pytest.raises(ValueError, match="a stack acts by row group"):
        merge(model, ActivScalar.stack([intervention]))
    with pytest.raises(ValueError, match="made for another model"):
        merge(model, ActivScalar.for_model(tiny_model("gpt2")))
    with pytest.raises(TypeError, match="intervention: got float"):
        merge(model, 1.0)  # type: ignore[arg-type]
    with torch.no_grad():
        intervention.alpha[1] = float("nan")
    with pytest.raises(ValueError, match="alpha: 4 of 8 values are not finite"):
        merge(model, intervention)
    assert same(model, before)


def test_shared_and_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    intervention = randomised(ActivScalar.for_model(model, layers=[0]))
    before = weights(model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj.weight shares its memory with model.layers.1"):
        merge(model, intervention)
    layers[1].self_attn.o_proj.weight = nn.Parameter(layers[0].self_attn.o_proj.weight.data.view(32, 32))
    with pytest.raises(ValueError, match="shares its memory"):
        merge(model, intervention)
    assert same(model, before)
    layers[0].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight of layer 0's projection is torch.int8 on cpu"):
        merge(model, intervention)


def test_a_merge_that_fails_halfway_puts_back_what_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, intervention = weights(model), randomised(ActivScalar.for_model(model))
    second = model.model.layers[1].self_attn.o_proj.weight
    copy_ = Tensor.copy_
    calls = []

    def failing(self: Tensor, source: Tensor, *args: object) -> Tensor:
        calls.append(self is second)
        if calls.count(True) == 1 and self is second:
            raise RuntimeError("out of memory")
        return copy_(self, source, *args)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        merge(model, intervention)
    monkeypatch.undo()
    assert same(model, before)
    with pytest.raises(ValueError, match="no intervention is merged"):
        unmerge(model)
