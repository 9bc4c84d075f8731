"""One update of causal head gating, written from its description (Nam et al., arXiv 2505.13737): a baseline in cost.

It learns something else: how much of each head a task needs, by a gate from 0 to 1.

From the description: the model is frozen; a gate G[l, h] in (0, 1), the sigmoid of a parameter, multiplies what head h
of layer l adds before the attention's output projection; the loss is −Σ log P(y | x; G) − λ·Σ clip(σ⁻¹(G)), so that
λ > 0 pulls the gates towards 1 and λ < 0 towards 0; it is minimised by gradient descent, for λ = 0 first.

Our reading: Adam; σ⁻¹(G) is the parameter itself, clipped at ±4; gates start at σ(2); the mean over prompts in the
place of the sum; y is the correct answer's token; the logits are those of all positions, as a causal language model
returns them, in one forward pass of the prompts with their answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from actscale_fast.architectures.layout import layout

from .steps import Work

LAMBDA, CLIP, START, LR = 0.1, 4.0, 2.0, 0.03


class HeadGating:
    """The update on the prompts of the work's first fit; returns the loss."""

    def __init__(self, work: Work) -> None:
        self.model, rows = work.model, work.rows[0]
        found = layout(work.model)
        self.projections = found.projections
        gates = torch.full((found.n_layers, found.n_heads), START, device=work.data.device)
        self.gates = gates.requires_grad_()  # before the sigmoid
        self.optimizer = torch.optim.Adam([self.gates], lr=LR)
        batch = work.data.batch(rows)
        self.target = work.data.correct[rows]
        ids = torch.cat([batch.input_ids, self.target[:, None]], 1)
        mask = torch.cat([batch.attention_mask, torch.ones_like(self.target)[:, None]], 1)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        self.arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def gate(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            heads = inputs[0].unflatten(-1, (self.gates.shape[1], -1))  # [B, T, H, D]
            return ((heads * self.gates[layer].sigmoid()[:, None].to(heads.dtype)).flatten(-2),)

        return gate

    def loss(self) -> Tensor:
        hooks = [p.register_forward_pre_hook(self._hook(layer)) for layer, p in enumerate(self.projections)]
        try:
            logits: Tensor = self.model(**self.arguments).logits  # [B, T, V]
        finally:
            for hook in hooks:
                hook.remove()
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = nn.functional.cross_entropy(logits[:, -2].to(wide), self.target)  # the token before y predicts it
        return loss - LAMBDA * self.gates.clamp(-CLIP, CLIP).sum()

    def __call__(self) -> tuple[Tensor, ...]:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)
