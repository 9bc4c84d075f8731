"""Patching: exact, per row, nested, exception-safe, on one instance, and gone without a trace."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from model_zoo import IDS, SITES, logits, randomised, scalars, tiny_model
from torch import Tensor, nn

from actscale_fast.architectures.layout import layout
from actscale_fast.interventions import ActivScalar, Intervention, SteerVec
from actscale_fast.patching.patch import patch


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zero_parameters_and_zero_strength_change_no_bit(
    dtype: torch.dtype, site: str, positions: list[int] | None
) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = logits(model)
    for cls in (ActivScalar, SteerVec):
        intervention = cls.for_model(model, site=site, positions=positions)
        with patch(model, intervention):
            assert torch.equal(logits(model), before)
        with patch(model, randomised(intervention), strength=0.0) as handle:
            assert torch.equal(logits(model), before)
            handle.strength = torch.tensor([0.0, 1.0, 0.0])
            mixed = logits(model)
            assert torch.equal(mixed[0], before[0])
            assert not torch.equal(mixed[1], before[1])
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_stay_fp32_whatever_the_model_is(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    intervention = scalars(model)
    with patch(model, intervention):
        loss = model(IDS).logits.float().square().mean()
        loss.backward()
    assert intervention.alpha.dtype == torch.float32
    assert intervention.alpha.grad is not None
    assert intervention.alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cls", [ActivScalar, SteerVec])
def test_each_row_has_its_own_strength(cls: type[Intervention], site: str, positions: list[int] | None) -> None:
    model = tiny_model("opt")  # its mlp_out flattens rows and tokens
    intervention = randomised(cls.for_model(model, site=site, positions=positions))
    strength = torch.tensor([1.0, -1.0, 0.25])
    with patch(model, intervention, strength):
        together = logits(model)
    for row in range(3):
        with patch(model, intervention, strength[row].item()):
            torch.testing.assert_close(together[row : row + 1], logits(model, IDS[row : row + 1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("cls", [ActivScalar, SteerVec])
def test_each_row_has_its_own_part_of_a_stack(cls: type[Intervention], positions: list[int] | None) -> None:
    model = tiny_model("llama")
    parts = [randomised(cls.for_model(model, positions=positions), seed) for seed in (1, 2)]
    stack = cls.stack(parts)
    with patch(model, stack, strength=0.5, group=torch.tensor([1, 0, 1])):
        together = logits(model)
    for row, part in enumerate([1, 0, 1]):
        with patch(model, parts[part], strength=0.5):
            torch.testing.assert_close(together[row : row + 1], logits(model, IDS[row : row + 1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="group: got None for 2 stacked interventions"):
        patch(model, stack)
    with pytest.raises(ValueError, match="group: got values 0 to 2, expected 0 to 1"):
        patch(model, stack, group=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="group: the intervention is not a stack"):
        patch(model, parts[0], group=torch.tensor([0, 0, 0]))


def test_strength_changes_on_the_handle_take_effect_at_once() -> None:
    model = tiny_model("llama")
    intervention = scalars(model)
    with patch(model, intervention, -2.0):
        expected = logits(model)
    with patch(model, intervention) as handle:
        logits(model)
        handle.strength = -2.0
        assert torch.equal(logits(model), expected)
        assert handle.strength == -2.0


def test_two_patches_on_one_head_multiply_and_come_off_in_any_order() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    first, second, product = scalars(model, 1), scalars(model, 2), ActivScalar.for_model(model)
    before = logits(model)
    with torch.no_grad():
        product.alpha.copy_((1 + first.alpha) * (1 + second.alpha) - 1)
    with patch(model, product):
        expected = logits(model)
    with patch(model, second):
        only_second = logits(model)
    outer = patch(model, first)
    inner = patch(model, second)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    outer.remove()
    assert torch.equal(logits(model), only_second)
    inner.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("site", ["head", "residual"])
def test_nested_patches_apply_in_the_order_in_which_they_were_made(site: str) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    scale, shift = scalars(model, site=site), randomised(SteerVec.for_model(model, site=site))
    scaled_shift = SteerVec.for_model(model, site=site)
    with torch.no_grad():
        scaled_shift.vectors.copy_(shift.vectors * (1 + scale.alpha[..., None]))
    with patch(model, shift), patch(model, scale):
        found = logits(model)
    with patch(model, scale), patch(model, scaled_shift):
        torch.testing.assert_close(logits(model), found, rtol=1e-5, atol=1e-5)


def test_an_exception_inside_the_block_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before, classes, attributes = (
        logits(model),
        [type(m) for m in model.modules()],
        [set(m.__dict__) for m in model.modules()],
    )
    with contextlib.suppress(KeyError), patch(model, scalars(model, positions=[0])):
        assert not torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), before)
    handle = patch(model, scalars(model, positions=[0]), strength=torch.ones(2))
    with pytest.raises(ValueError, match="strength: got 2 values for a batch of 3 rows, expected one per row"):
        logits(model)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert all(not m._forward_hooks or m not in layout(model).projections for m in model.modules())


def test_names_keys_and_classes_stay_while_patched() -> None:
    model = tiny_model("llama")
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    with patch(model, scalars(model)), patch(model, scalars(model, site="residual")):
        assert [name for name, _ in model.named_modules()] == names
        assert list(model.state_dict()) == keys
        assert type(model.model.layers[0].self_attn.o_proj).__name__ == "Linear"
        assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)
        assert all("actscale" not in name for name, _ in model.named_parameters())


def test_another_model_of_the_class_never_sees_the_patch() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    with patch(model, scalars(model)):
        assert not torch.equal(logits(model), logits(other))
        fresh = tiny_model("llama")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_not_patched(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    before, expected = logits(model), model.generate(IDS, max_new_tokens=3)
    with patch(model, scalars(model, positions=[0])), patch(model, scalars(model, site="residual")):
        twin = duplicate(model)
        assert torch.equal(logits(twin), before)
        assert torch.equal(twin.generate(IDS, max_new_tokens=3), expected)
    assert "generate" not in twin.__dict__
    with patch(twin, scalars(twin)):
        assert not torch.equal(logits(twin), before)


def test_a_handle_does_not_keep_its_model_alive() -> None:
    model = tiny_model("llama")
    handle = patch(model, scalars(model, positions=[0]))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    handle.remove()


def test_recorded_hidden_states_are_those_that_the_next_layer_gets() -> None:
    # Early versions of transformers 5 record inside `forward`, before any hook on the layer's output.
    pytest.importorskip("transformers.utils.output_capturing")
    model = tiny_model("llama")
    model(IDS, output_hidden_states=True)  # transformers adds its recording hooks on first use
    with patch(model, scalars(model, site="residual")), torch.no_grad():
        recorded = model(IDS, output_hidden_states=True).hidden_states[1]
        given: list[Tensor] = []
        handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
        model(IDS)
        handle.remove()
    assert torch.equal(recorded, given[0])


def test_an_intervention_of_another_model_is_refused_with_every_difference() -> None:
    model = tiny_model("llama")
    message = r"made for another model: model_type 'qwen3' \(the model has 'llama'\), head_dim 10 \(the model has 8\)$"
    with pytest.raises(ValueError, match=message):
        patch(model, ActivScalar.for_model(tiny_model("qwen3")))
    assert not hasattr(model.model, "_actscale_fast")


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (float("nan"), ValueError, "strength: got nan, expected a finite number"),
        ("much", TypeError, "strength: got str, expected a float or a tensor"),
        (torch.zeros(0), ValueError, r"strength: got shape \(0,\), expected a float or a tensor \[B\]"),
        (torch.ones(2, 2), ValueError, r"strength: got shape \(2, 2\), expected a float or a tensor \[B\]"),
        (torch.tensor([1.0, float("inf"), 0.0]), ValueError, "strength: some of its values are not finite"),
    ],
)
def test_bad_strengths_are_refused_and_leave_no_trace(strength: object, error: type[Exception], message: str) -> None:
    model = tiny_model("llama")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        patch(model, ActivScalar.for_model(model), strength)  # type: ignore[arg-type]
    assert [type(module) for module in model.modules()] == classes


def test_bad_arguments_are_refused() -> None:
    model = tiny_model("llama")
    intervention = scalars(model)
    with pytest.raises(TypeError, match="intervention: got Tensor, expected an Intervention"):
        patch(model, torch.zeros(2))  # type: ignore[arg-type]
    with torch.no_grad():
        intervention.alpha[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="alpha: 1 of 8 values are not finite"):
        patch(model, intervention)


def test_accelerates_hooks_and_a_patch_live_together() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    intervention = scalars(model, positions=[0, -1])
    before = logits(model)
    with patch(model, intervention):
        expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    with patch(model, intervention):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
