"""Causal head gating: which heads a model needs to predict some texts (Nam et al., arXiv 2505.13737).

A gate G = σ(θ), [L, H], multiplies each head before the attention's output projection: `scale_heads` with α = G − 1.
Adam minimises NLL(θ) − λ·mean(clip(θ, ±c)): first with λ = 0, then from there with λ > 0 (gates open, G⁺) and with
λ < 0 (gates close, G⁻).

This is the method on any labelled texts; `select_heads(method="gates")` runs it on examples with two answers, with its
contrastive variant and a choice of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..architectures.layout import layout
from ..learning.head_selection.gates import HeadGates
from ..modules.evaluation_mode import evaluation_mode
from ..patching.head_mask import HeadMask, head_mask


def scored(batch: Mapping[str, Tensor]) -> Tensor:
    """The columns where any row has a label for the next token; called once per batch because it reads values."""
    if not len(wanted := (batch["labels"][:, 1:] != -100).any(0).nonzero().flatten()):
        raise ValueError("labels: got only -100 after the first column, expected token ids")
    return wanted


def gated_nll(model: Any, handle: HeadMask, gates: Tensor, batch: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Mean NLL of the labelled tokens under gates [L, H]."""
    handle.mask = gates
    logits = model(**{**batch, "labels": None}, logits_to_keep=wanted, use_cache=False).logits  # [B, W, V]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, wanted + 1].flatten())


def fit_gates(
    model: Any, batches: Sequence[Mapping[str, Tensor]], *, steps: int = 100, lr: float = 0.1, weight: float = 0.1,
    clip: float = 4.0, start: float = 2.0, forget: Sequence[Mapping[str, Tensor]] = ()) -> HeadGates:  # fmt: skip
    """Run the three fits, one batch per update.

    Args:
        batches: each holds the model's inputs and `labels`; −100 is ignored.
        weight: |λ|.
        forget: batches of a task that the gated model is to forget, in the contrastive variant: the NLL of one of them
            per update is subtracted (our reading).
    """
    found, fits, columns = layout(model), list[Tensor](), [scored(batch) for batch in batches]
    forgotten = [scored(batch) for batch in forget]
    first = torch.full((found.n_layers, found.n_heads), start, dtype=torch.float32, device=model.device)
    with evaluation_mode(model), head_mask(model, first.sigmoid()) as handle:
        for pressure in (0.0, weight, -weight):
            optimizer = torch.optim.Adam([theta := (fits[0] if fits else first).clone().requires_grad_()], lr=lr)
            for step in range(steps):
                at = step % len(batches)
                loss = gated_nll(model, handle, theta.sigmoid(), batches[at], columns[at])
                if forget:
                    other = step % len(forget)
                    loss = loss - gated_nll(model, handle, theta.sigmoid(), forget[other], forgotten[other])
                (theta.grad,) = torch.autograd.grad(loss - pressure * theta.clamp(-clip, clip).mean(), theta)
                optimizer.step()
            fits.append(theta.detach())
    return HeadGates(*(theta.sigmoid() for theta in fits))
