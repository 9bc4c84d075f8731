"""head_mask: what multiplying the attention's probabilities did in transformers 4, under every implementation."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from model_zoo import CONFIGS, IDS, checkpoint_activations, tiny_model
from torch import Tensor

import actscale_fast as af

L, H = 2, 4


def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **given).logits  # type: ignore[no-any-return]


def random_mask(*lead: int) -> Tensor:
    return torch.rand(*lead, L, H, generator=torch.Generator().manual_seed(3)) * 2 - 0.5


def mask_probabilities(monkeypatch: pytest.MonkeyPatch, model: Any, mask: Tensor) -> None:
    """Let eager attention multiply its probabilities after the softmax by mask [1 or B, L, H]."""
    home = importlib.import_module(type(model).__module__)
    attend = home.eager_attention_forward

    def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        _, weights = attend(module, query, key, value, *args, **kwargs)
        weights = weights * mask[:, module.layer_idx, :, None, None]
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(home, "eager_attention_forward", masked)
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "opt"])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_the_mask_on_the_probabilities_with_its_gradient(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")  # early transformers 5 leave Gemma 2's soft-cap out of SDPA
    weights = torch.randn(logits(model).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    given = random_mask(rows) if rows > 1 else random_mask()
    mask = given.requires_grad_()
    with af.ops.use_backend("reference"), af.head_mask(model, mask):
        masked = logits(model)
        (masked * weights).sum().backward()
    plain = given.detach().double().view(rows, L, H).requires_grad_()
    mask_probabilities(monkeypatch, model, plain)
    expected = logits(model)
    (expected * weights).sum().backward()
    torch.testing.assert_close(masked, expected, rtol=1e-6, atol=1e-6)
    assert mask.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(mask.grad, plain.grad.view(mask.shape).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_same(implementation: str) -> None:
    model = tiny_model("llama", hidden_size=64, num_attention_heads=4, head_dim=16)  # flex wants 16 at least
    mask = random_mask()
    with af.head_mask(model, mask):
        expected = logits(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad(), af.head_mask(model, mask):  # flex attention has no backward pass on a CPU
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_in_every_family_it_is_the_activation_scalars_less_one(family: str) -> None:
    model, mask = tiny_model(family), random_mask()
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.copy_((mask - 1)[:, None])
    with af.patch(model, scalars):
        expected = logits(model)
    with af.head_mask(model, mask):
        assert torch.equal(logits(model), expected)


def test_ones_change_no_bit_and_zeros_remove_the_columns_of_the_projection() -> None:
    model = tiny_model()
    before = logits(model)
    mask = torch.ones(L, H, dtype=torch.int64)
    with af.head_mask(model, mask):
        assert torch.equal(logits(model), before)
        mask[1, 2] = 0  # read in each pass
        pruned = logits(model)
    width = model.config.head_dim if hasattr(model.config, "head_dim") else 8
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
    torch.testing.assert_close(pruned, logits(model))


def test_one_row_of_heads_serves_every_layer_and_bools_are_taken() -> None:
    model = tiny_model()
    keep = torch.tensor([True, False, True, True])
    with af.head_mask(model, keep):
        shared = logits(model)
    with af.head_mask(model, keep.float().expand(L, H)):
        assert torch.equal(logits(model), shared)


def test_rows_have_masks_of_their_own_and_beams_share_their_rows() -> None:
    model, masks = tiny_model(), random_mask(3)
    with af.head_mask(model, masks):
        together = logits(model)
        found = model.generate(IDS, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row in range(3):
        with af.head_mask(model, masks[row]):
            torch.testing.assert_close(together[row : row + 1], logits(model, IDS[row : row + 1]))
            alone = model.generate(IDS[row : row + 1], num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert found[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_a_compiled_model_sees_the_mask_and_its_removal() -> None:
    model, mask = tiny_model(), random_mask()
    with af.head_mask(model, mask):
        expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled)
    with af.head_mask(compiled, mask):
        torch.testing.assert_close(logits(compiled), expected)
    torch.testing.assert_close(logits(compiled), before)


def test_masks_nest_with_patches_and_removal_restores_the_modules() -> None:
    model, mask = tiny_model(), random_mask()
    before = logits(model)
    classes = [type(module) for module in model.modules()]
    outer, inner = af.head_mask(model, mask), af.head_mask(model, mask)
    with af.head_mask(model, mask * mask):
        pass
    squared = logits(model)
    outer.remove()
    outer.remove()
    inner.remove()
    with af.head_mask(model, mask * mask):
        torch.testing.assert_close(logits(model), squared)
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == classes


def test_a_handle_does_not_keep_its_model_alive() -> None:
    model = tiny_model()
    handle, reference = af.head_mask(model, random_mask()), weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    handle.remove()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1.0, 0.0], TypeError, r"mask: got list, expected a real tensor \[H\], \[L, H\] or \[B, L, H\]"),
        (torch.ones(3), ValueError, r"mask: got shape \(3,\), expected .* with H = 4 and L = 2"),
        (torch.ones(H, L), ValueError, r"mask: got shape \(4, 2\)"),
        (torch.ones(()), ValueError, r"mask: got shape \(\)"),
        (torch.ones(1, 1, L, H), ValueError, r"mask: got shape \(1, 1, 2, 4\)"),
        (torch.full((H,), torch.nan), ValueError, "mask: some of its values are not finite"),
    ],
)
def test_a_bad_mask_is_refused_and_the_model_is_as_before(mask: Any, error: type[Exception], message: str) -> None:
    model = tiny_model()
    before = logits(model)
    with pytest.raises(error, match=message):
        af.head_mask(model, mask)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gradient_checkpointing_repeats_a_pass_under_the_mask_it_had(reentrant: bool, rows: int) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny_model().requires_grad_(False).train()
        if checkpointing:
            checkpoint_activations(model, reentrant)
        masks = [(random_mask(rows) + shift).requires_grad_() for shift in (0.0, 0.5)]
        with af.head_mask(model, masks[0]) as handle:
            first = logits(model)
            handle.mask = masks[1]
            (first.sin().sum() + 2 * logits(model).sin().sum()).backward()
        return [mask.grad for mask in masks if mask.grad is not None]

    found, expected = gradients(True), gradients(False)
    assert len(found) == 2
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_backward_pass_after_the_mask_is_gone_is_refused_under_checkpointing() -> None:
    model = tiny_model().train()
    checkpoint_activations(model, reentrant=True)
    with af.head_mask(model, random_mask().requires_grad_()):
        loss = logits(model).sum()
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        loss.backward()


def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    with (
        af.head_mask(model := tiny_model(), random_mask(2)),
        pytest.raises(ValueError, match="mask: got 2 values for a batch of 3 rows"),
    ):
        logits(model)
