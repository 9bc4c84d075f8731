"""Causal head gating: how much of each head the next tokens of some texts need (Nam et al., arXiv 2505.13737).

A gate G = σ(θ), [L, H], multiplies each head before the attention's output projection: `scale_heads` with α = G − 1.
Adam minimises NLL(θ) − λ·mean(clip(θ, ±c)): λ = 0 first, from there λ > 0 (gates open, G⁺) and λ < 0 (they close, G⁻).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import HeadMask, frozen, head_mask, layout


@dataclass(frozen=True)
class HeadGates:
    """The gates of the three fits, each fp32 [L, H] from 0 to 1."""

    free: Tensor  # λ = 0
    opened: Tensor  # G⁺
    closed: Tensor  # G⁻

    @property
    def roles(self) -> dict[str, Tensor]:
        """Facilitating heads stay open when pressed to close, interfering ones closed when pressed to open."""
        opened, closed = self.opened, self.closed
        return {"facilitating": closed, "interfering": 1 - opened, "irrelevant": opened * (1 - closed)}


def gated_nll(model: Any, handle: HeadMask, gates: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean NLL of the labelled tokens under gates [L, H]; logits exist where some row has a label."""
    handle.mask, labels = gates, batch["labels"][:, 1:]
    wanted = (labels != -100).any(0).nonzero().flatten()
    if not len(wanted):
        raise ValueError("labels: got -100 alone after the first column, expected token ids among them")
    logits = model(**{**batch, "labels": None}, logits_to_keep=wanted, use_cache=False).logits  # [B, W, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, wanted].flatten())


def fit_gates(
    model: Any, batches: Sequence[Mapping[str, Tensor]], *, steps: int = 100, lr: float = 0.1, weight: float = 0.1,
    clip: float = 4.0, start: float = 2.0) -> HeadGates:  # fmt: skip
    """The three fits. Batches, one an update: what the model takes, and `labels` (−100: not scored); weight: |λ|."""
    found, fits = layout(model), list[Tensor]()
    first = torch.full((found.n_layers, found.n_heads), start, device=model.device)
    with frozen(model), head_mask(model, first.sigmoid()) as handle:
        for pressure in (0.0, weight, -weight):
            theta = (fits[0] if fits else first).clone().requires_grad_()
            optimizer = torch.optim.Adam([theta], lr=lr)
            for step in range(steps):
                loss = gated_nll(model, handle, theta.sigmoid(), batches[step % len(batches)])
                (theta.grad,) = torch.autograd.grad(loss - pressure * theta.clamp(-clip, clip).mean(), theta)
                optimizer.step()
            fits.append(theta.detach())
    return HeadGates(*(theta.sigmoid() for theta in fits))
