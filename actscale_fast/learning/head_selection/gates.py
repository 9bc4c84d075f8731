"""Causal head gating: gates between 0 and 1 on all heads, learned under opposite pressures (arXiv 2505.13737).

A gate G = σ(θ) multiplies each head (α = G − 1). Adam minimises the examples' loss − λ·mean(clip(θ, ±c)): first with
λ = 0, then from there with λ > 0 (gates open, G⁺) and with λ < 0 (gates close, G⁻). The last two fits are row groups of
the same passes. What stays open under pressure to close facilitates the task, what closes under pressure to open
interferes with it, and what follows either pressure is irrelevant.

    facilitating G⁻        interfering 1 − G⁺        irrelevant G⁺·(1 − G⁻)

The loss is −log p(correct). The contrastive variant retains one task and makes the model forget another: its loss is
−log p(correct) + log p(wrong).

Our reading: the pressure is the mean over the heads, so that one λ serves models of any size, where the paper's formula
has a sum; the forgotten task of the contrastive variant is that of the wrong answers on the same prompts. For a choice
of heads, a head's score is the larger one of facilitating and interfering; α = 1 amplifies the former, −1 suppresses
the latter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_counts, check_finite
from ...interventions import ActivScalar
from .subject import AnswerPasses, Scored, Subject, batches

_ROLES = ("facilitating", "interfering", "irrelevant")


class HeadGates(NamedTuple):
    """The gates of the three fits, each fp32 [L, H] from 0 to 1: λ = 0, λ > 0 (G⁺), λ < 0 (G⁻)."""

    free: Tensor
    opened: Tensor
    closed: Tensor

    @property
    def roles(self) -> dict[str, Tensor]:
        """Facilitating heads stay open under λ < 0, interfering ones close under λ > 0 (our reading)."""
        irrelevant = self.opened * (1 - self.closed)
        return {"facilitating": self.closed, "interfering": 1 - self.opened, "irrelevant": irrelevant}

    @property
    def taxonomy(self) -> list[list[str]]:
        """The role of each head by layer: the one with the largest value, the first of them among equals."""
        values = torch.stack([self.roles[name] for name in _ROLES])
        return [[_ROLES[index] for index in layer] for layer in values.argmax(0).tolist()]


def by_gates(
    subject: Subject,
    *,
    contrastive: bool = False,
    steps: int = 60,
    lr: float = 0.1,
    weight: float = 0.1,
    clip: float = 4.0,
    start: float = 2.0,
    fit_batch_size: int = 16,
) -> Scored:
    """Scores by the roles of heads; see the module.

    Args:
        subject: the model and the examples.
        contrastive: forget the wrong answers as well.
        steps: updates of each fit.
        lr: Adam's learning rate for θ.
        weight: |λ|.
        clip: c.
        start: θ before the first update.
        fit_batch_size: prompts per update.
    """
    gates = fit_head_gates(
        subject, contrastive=contrastive, steps=steps, lr=lr, weight=weight, clip=clip, start=start,
        fit_batch_size=fit_batch_size,
    )  # fmt: skip
    roles = gates.roles
    scores = torch.maximum(roles["facilitating"], roles["interfering"])
    directions = torch.where(roles["facilitating"] >= roles["interfering"], 1.0, -1.0)
    details = {name: values.tolist() for name, values in gates._asdict().items()} | {"taxonomy": gates.taxonomy}
    return Scored(scores, directions, details)


def fit_head_gates(
    subject: Subject, *, contrastive: bool, steps: int, lr: float, weight: float, clip: float, start: float,
    fit_batch_size: int,
) -> HeadGates:  # fmt: skip
    """Run the three fits; arguments as in `by_gates`."""
    check_counts(steps=steps, fit_batch_size=fit_batch_size)
    check_finite(lr=lr, weight=weight, clip=clip, start=start)
    first = torch.full((1, *subject.shape), start, dtype=torch.float32, device=subject.scalars.device)
    kept = (contrastive, steps, lr, clip, fit_batch_size)
    free = _fit(subject, first, (0.0,), *kept)
    both = _fit(subject, free.repeat(2, 1, 1), (weight, -weight), *kept)
    return HeadGates(*(theta.sigmoid().cpu() for theta in (free[0], *both)))


def _fit(
    subject: Subject, theta: Tensor, pressures: tuple[float, ...], contrastive: bool, steps: int, lr: float,
    clip: float, batch_size: int,
) -> Tensor:  # fmt: skip
    """θ [G, L, H] after some updates, one pressure λ per group."""
    from tqdm.auto import tqdm

    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    stack = ActivScalar(subject.scalars.location, n_groups=len(theta), device=theta.device)
    weights = torch.tensor(pressures, dtype=torch.float32, device=theta.device)[:, None, None]
    steps_of = tqdm(
        batches(subject, steps, batch_size), total=steps, desc="gates", disable=not subject.progress, leave=False
    )
    with torch.enable_grad(), AnswerPasses(subject, stack) as passes:
        for kinds in steps_of:
            gates = theta.detach().sigmoid()
            with torch.no_grad():
                stack.alpha.copy_((gates - 1)[:, :, None])
            n = sum(map(len, kinds))
            gradient = torch.zeros_like(stack.alpha)
            for rows in kinds:
                logp = passes.log_probabilities(rows)  # [G, B, 2]
                losses = logp[..., 1] - logp[..., 0] if contrastive else -logp[..., 0]
                gradient += torch.autograd.grad(losses.sum() / n, stack.alpha)[0]
            inside = (theta.detach().abs() <= clip).to(theta) / theta[0].numel()
            theta.grad = gradient[:, :, 0] * gates * (1 - gates) - weights * inside
            optimizer.step()
    return theta.detach()
