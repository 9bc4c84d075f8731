"""Gradients through a patch: against central differences, and under gradient checkpointing of both kinds."""

from __future__ import annotations

import pytest
import torch
from model_zoo import IDS, SITES, checkpoint_activations, randomised, scalars, tiny_model
from torch import Tensor

from actscale_fast.interventions import ActivScalar, Intervention, SteerVec
from actscale_fast.patching.patch import patch


@pytest.mark.parametrize("positions", [None, [0, -2]])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cls", [ActivScalar, SteerVec])
def test_gradients_agree_with_central_differences(
    cls: type[Intervention], site: str, positions: list[int] | None
) -> None:
    model = tiny_model("gpt2", dtype=torch.float64).requires_grad_(False)  # Llama's norm rounds to float32 inside
    intervention = randomised(cls.for_model(model, site=site, positions=positions)).double()
    (parameter,) = intervention.parameters()
    weights = torch.randn(3, 6, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def objective() -> Tensor:
        return (model(IDS).logits * weights).sum()

    with patch(model, intervention, strength=torch.tensor([1.0, -1.0, 0.5])):
        (gradient,) = torch.autograd.grad(objective(), parameter)
        values, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                values.append(objective())
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("site", SITES)
def test_gradient_checkpointing_gives_the_same_gradients(
    site: str, positions: list[int] | None, reentrant: bool
) -> None:
    model = tiny_model("llama").requires_grad_(False).train()
    intervention = scalars(model, site=site, positions=positions)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, reentrant)
        intervention.zero_grad()
        with patch(model, intervention, strength=torch.tensor([1.0, -1.0, 0.5])):
            loss = model(IDS).logits.square().mean()
            with torch.no_grad():
                model(IDS[:, 2:5])  # another forward pass stands between the first one and its repetition
            loss.backward()
        assert intervention.alpha.grad is not None
        gradients.append(intervention.alpha.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().min() > 0
    assert "CheckpointWithContexts" not in repr(
        [layer.__dict__.get("_gradient_checkpointing_func") for layer in model.model.layers]
    )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpointed_backward_pass_after_removal_is_refused() -> None:
    model = tiny_model("llama").requires_grad_(False).train()
    checkpoint_activations(model, reentrant=True)
    with patch(model, scalars(model)):
        loss = model(IDS).logits.square().mean()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside the `with` block"):
        loss.backward()
