"""Projection: the component along a direction is set, whatever it was; the rest is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.architectures.families import FAMILIES
from actscale_fast.architectures.layout import layout

IDS = torch.tensor([[5, 9, 12, 7, 30, 2], [8, 8, 41, 3, 19, 60]])


def unit(projection: af.Projection) -> af.Projection:
    with torch.no_grad():
        projection.directions /= projection.directions.norm(dim=-1, keepdim=True)
    return projection


def edited(model: Any, projection: af.Projection, strength: Any, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the site's activation before, and after), at the projection's only layer of the residual stream."""
    seen: list[Tensor] = []
    layer = layout(model).layers[projection.location.layers[0]]
    handle = layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(IDS)
        with af.patch(model, projection, strength=strength, group=group):
            model(IDS)
    handle.remove()
    return seen[0], seen[1]


def test_the_projection_becomes_the_target_and_the_rest_stays() -> None:
    model = tiny_model("llama")
    projection = unit(randomised(af.Projection.for_model(model, site="residual", layers=[0])))  # type: ignore[arg-type]
    u, t = projection.directions[0, 0, 0].detach(), float(projection.targets.detach())
    before, after = edited(model, projection, 1.0)
    torch.testing.assert_close(after @ u, torch.full((2, 6), t), rtol=1e-4, atol=1e-4)
    across = torch.eye(32) - torch.outer(u, u)
    torch.testing.assert_close(after @ across, before @ across, rtol=1e-4, atol=1e-4)


def test_strength_is_how_far_it_moves_towards_the_target_row_by_row() -> None:
    model = tiny_model("llama")
    projection = unit(randomised(af.Projection.for_model(model, site="residual", layers=[1])))  # type: ignore[arg-type]
    u, t = projection.directions[0, 0, 0].detach(), projection.targets.detach()
    before, after = edited(model, projection, torch.tensor([0.5, -2.0]))
    for row, strength in enumerate((0.5, -2.0)):
        expected = before[row] + strength * (t.reshape(1, 1) - (before[row] @ u)[:, None]) * u
        torch.testing.assert_close(after[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_direction_of_zero_does_nothing_in_every_family(family: str) -> None:
    model = tiny_model(family)
    projection = af.Projection.for_model(model)
    with torch.no_grad():
        projection.targets.fill_(3.0)
        expected = model(IDS).logits
        with af.patch(model, projection):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)


def test_heads_and_positions_have_their_own_direction() -> None:
    model = tiny_model("llama")
    projection = randomised(af.Projection.for_model(model, layers=[1], positions=[0, -2]))
    seen: list[Tensor] = []
    module = layout(model).projections[1]
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(IDS)
        handle.remove()
        with af.patch(model, projection):
            handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            model(IDS)
    handle.remove()
    before, after = (value.unflatten(-1, (4, 8)) for value in seen)
    expected = before.clone()
    for slot, token in ((0, 0), (1, 4)):
        for head in range(4):
            u, t = projection.directions[0, slot, head].detach(), projection.targets[0, slot, head].detach()
            h = before[:, token, head]
            expected[:, token, head] = h + (t - h @ u)[:, None] * u
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    projection = unit(randomised(af.Projection.for_model(model, site="residual", layers=[0])))  # type: ignore[arg-type]
    u, t = projection.directions[0, 0, 0].detach(), projection.targets.detach().reshape(())
    before, after = edited(model, projection, 1.0)
    wide = before.float()
    assert torch.equal(after, (wide + (t - (wide * u).sum(-1))[..., None] * u).bfloat16())


def test_a_fit_of_directions_that_are_zero_is_refused() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    examples = [af.Example("The capital of A is", " Rome", " Oslo")]
    with pytest.raises(ValueError, match="directions are 0 has no gradient"):
        af.fit(model, tokens, examples, af.Projection.for_model(model), progress=False)


def test_generation_with_padding_and_cache_is_that_of_recomputing_every_token() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    projection = unit(randomised(af.Projection.for_model(model, site="residual", layers=[1])))  # type: ignore[arg-type]
    texts = ["The capital of A is", "what is"]
    batch = tokens(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad(), af.patch(model, projection, strength=2.0):
        found = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, -6:]
        for row, text in enumerate(texts):
            ids = tokens(text, return_tensors="pt").input_ids
            length = ids.shape[1]
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert ids[0, length:].tolist() == found[row].tolist()
