"""The full computation that the engine must agree with: a forward pass a prompt and direction, and formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast.interventions import Intervention
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.execution import Execution

#: Of differing lengths, so that batches are padded; one longer than the sliding windows of the tiny models.
PROMPTS = [[5, 9, 12, 7, 30, 2], [8, 8, 41, 3], [4, 6, 10, 11, 13, 14, 22, 23, 24, 25, 26, 27], [9, 9, 9]]


class TokenExamples(EncodedExamples):
    """Examples that are token ids already."""

    def __init__(self, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
        self.examples = []
        self.prompts = [list(prompt) for prompt in prompts]
        self.device = torch.device("cpu")
        self.pad_id = 0
        self.correct = torch.arange(10, 10 + len(prompts))
        self.wrong = torch.arange(30, 30 + len(prompts))


def full(
    model: Any, data: EncodedExamples, intervention: Intervention, objective: af.Objective,
    rows: Sequence[int] | None = None, group: int | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(E and F [2], the gradient of each parameter) from logits of whole, unpadded prompts, one at a time."""
    rows = range(len(data)) if rows is None else rows
    parameters = [value for value in intervention.parameters() if value.requires_grad]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    terms = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    chosen = None if group is None else torch.tensor([group])
    with torch.enable_grad(), af.patch(model, intervention, group=chosen) as patched:
        for row in rows:
            ids = torch.tensor([data.prompts[row]])
            correct, wrong = int(data.correct[row]), int(data.wrong[row])
            patched.strength = 0.0
            reference = model(ids).logits[0, -1].detach().double()
            kept = torch.ones(reference.shape[0], dtype=torch.bool)
            if objective.exclude_answers:
                kept[[correct, wrong]] = False
            for sign in objective.directions:
                patched.strength = float(sign)
                z = model(ids).logits[0, -1].double()
                terms[0] = terms[0] + torch.relu(objective.margin - sign * (z[correct] - z[wrong]))
                p, q = reference[kept].log_softmax(-1), z[kept].log_softmax(-1)
                if objective.kl == "reverse":
                    p, q = q, p
                terms[1] = terms[1] + (p.exp() * (p - q)).sum()
    for parameter, learned in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(learned)
    loss = (terms[0] + objective.faithfulness * terms[1]) / len(rows)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.stack(terms).detach() / len(rows), zeros


def engine(
    model: Any, data: EncodedExamples, intervention: Intervention, objective: af.Objective,
    rows: Sequence[int] | None = None, *, checked: bool = True, **options: Any,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The same from one step of an engine.

    `checked`: with the engine's own comparison with the plain model, which leaves out a shortcut that would be wrong.
    """
    rows = range(len(data)) if rows is None else rows
    with pytest.MonkeyPatch.context() as context:
        if not checked:
            context.setattr(Engine, "_gradient_check", lambda self: None)
        with Engine(model, data, intervention, [objective], Execution(**options)) as opened:
            terms, gradients = opened.gradients([FitRequest(list(rows), objective)])
    return terms[0], gradients


def assert_equal_to_rounding(
    found: tuple[Tensor, Sequence[Tensor]], expected: tuple[Tensor, Sequence[Tensor]], tolerance: float = 2e-6
) -> None:
    """Terms and gradients agree to `tolerance` of the largest; scalars and their gradients are float32.

    A gradient that cancels (a norm follows the site) is compared at the size of the loss, whose unit it has.
    """
    (terms, gradients), (wanted_terms, wanted) = found, expected
    torch.testing.assert_close(terms[:2].double(), wanted_terms[:2].double(), rtol=tolerance, atol=tolerance)
    for gradient, one in zip(gradients, wanted, strict=True):
        scale = max(one.abs().max().item(), wanted_terms.abs().max().item())
        torch.testing.assert_close(gradient.double(), one.double(), rtol=0, atol=tolerance * scale)
