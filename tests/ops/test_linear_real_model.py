"""The losses from hidden states on the demo model: its own head, its own logits, random scalars on its heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import Inputs
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops

PROMPTS = ["The capital of France is", "The sky is", "Two and two make", "A dog is an", "In winter it is", "I live in"]


@pytest.mark.real_model
def test_from_the_real_models_hidden_states_come_the_losses_of_its_logits(
    inputs: Inputs, demo_model: tuple[Any, Any]
) -> None:
    model, tokenizer = demo_model
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.copy_(inputs.normal(*scalars.alpha.shape, scale=0.2))

    def last_hidden_state(prompt: str) -> Tensor:
        with torch.no_grad():
            batch: Tensor = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]
        return batch

    frozen = torch.stack([last_hidden_state(prompt) for prompt in PROMPTS])
    with af.patch(model, scalars):
        steered = torch.stack([last_hidden_state(prompt) for prompt in PROMPTS])
    head = model.get_output_embeddings()
    assert head.bias is None
    best = head(frozen).topk(2).indices
    answers, direction = (best[:, 0].contiguous(), best[:, 1].contiguous()), inputs.signs(len(PROMPTS))
    upstream = (inputs.normal(len(PROMPTS)), inputs.normal(len(PROMPTS)))

    def gradient_from_logits(hidden: Tensor, weight: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        leaf = hidden.detach().requires_grad_()
        reference_logits = frozen.to(weight) @ weight.t()
        made = ops.intervention_loss(leaf @ weight.t(), reference_logits, *answers, direction=direction, margin=4.0)
        (gradient,) = torch.autograd.grad(made, leaf, [u.to(made[0]) for u in upstream])
        return (made[0].detach(), made[1].detach()), gradient

    expected, _ = gradient_from_logits(steered, head.weight.detach())
    with ops.use_backend("reference"):
        _, d_exact = gradient_from_logits(steered.double(), head.weight.detach().double())
    assert expected[1].min() > 1e-3  # the scalars do move the model
    # Each probability is off by its logit's error, a few ulp of the largest; the gradient sums them against the head.
    logits = torch.stack([frozen, steered]) @ head.weight.detach().t()
    terms = logits.softmax(dim=-1).sum(0) * upstream[1].abs()[:, None]
    ulp = torch.finfo(torch.float32).eps * logits.abs().amax(dim=(0, 2))
    bound = ulp * (terms @ head.weight.detach().abs()).norm(dim=-1)
    leaf = steered.detach().requires_grad_()
    for backend in ("reference", "auto"):
        with ops.use_backend(backend):  # type: ignore[arg-type]
            statistics = ops.reference_statistics(frozen, head.weight, *answers)
            losses = ops.linear_intervention_loss(
                leaf, head.weight, statistics, *answers, direction=direction, margin=4.0
            )
            (gradient,) = torch.autograd.grad(losses, leaf, upstream)
            unmoved = ops.linear_intervention_loss(frozen, head.weight, statistics, *answers, direction=direction)
        for got, wanted in zip(losses, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
        error = (gradient - d_exact).norm(dim=-1)
        assert (error <= 4 * bound).all()
        assert not unmoved[1].any()
