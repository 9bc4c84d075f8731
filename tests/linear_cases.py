"""What the tests of the losses from hidden states share: random heads, and the losses by their definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from op_cases import Inputs, Losses, Rows, textbook_losses
from torch import Tensor


@dataclass
class Head:
    """Hidden states of the frozen and of the steered model, the head over them, and the answers."""

    frozen: Tensor  # [N, d]
    steered: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None
    correct: Tensor
    wrong: Tensor
    direction: Tensor
    options: dict[str, Any]  # softcap, logit_scale: of the head

    @property
    def answers(self) -> tuple[Tensor, Tensor]:
        return self.correct, self.wrong

    @property
    def of_head(self) -> dict[str, Any]:
        return {"bias": self.bias, **self.options}

    def to(self, device: torch.device) -> Head:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Head(**{**vars(self), **moved})


def head(
    inputs: Inputs,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    scale: float = 3.0,
    **options: Any,
) -> Head:
    """N rows, V tokens, width d; logits spread by about `scale`, moved by the intervention by a third of it."""
    n_rows, vocab, width = shape
    frozen = inputs.normal(n_rows, width)
    rows = inputs.rows(n_rows, vocab)
    return Head(
        frozen.to(dtype),
        (frozen + inputs.normal(n_rows, width, scale=1 / 3)).to(dtype),
        inputs.normal(vocab, width, scale=scale / width**0.5).to(dtype),
        inputs.normal(vocab).to(dtype) if bias else None,
        rows.correct, rows.wrong, rows.direction, options,
    )  # fmt: skip


def logits_of(h: Head, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's logits by their definition, every step in `dtype`."""
    z = hidden.to(dtype) @ h.weight.to(dtype).t()
    if h.bias is not None:
        z = z + h.bias.to(dtype)
    z = z * h.options.get("logit_scale", 1.0)
    softcap = h.options.get("softcap")
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def textbook(h: Head, upstream: tuple[Tensor, Tensor], dtype: torch.dtype, **options: Any) -> tuple[Losses, Tensor]:
    """The losses and the gradient of the steered hidden states; in float32 this is eager PyTorch.

    16-bit eager PyTorch rounds its logits and their gradient to 16 bits: it is `dtype` bfloat16 or float16.
    """
    leaf = h.steered.detach().cpu().to(dtype).requires_grad_()
    logits = logits_of(h, leaf, dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    reference = logits_of(h, h.frozen.cpu(), dtype)
    rows = Rows(logits.detach(), reference, h.correct.cpu(), h.wrong.cpu(), h.direction.cpu())
    losses = textbook_losses(rows, upstream, wide, **options)
    (gradient,) = torch.autograd.grad(logits, leaf, losses.gradient.to(logits.dtype))
    # The KL is H(q) − H(p) + s·h·(Wᵀq − Wᵀp): beside the terms of the definition, those of two products of d terms.
    weight, scale = h.weight.cpu().double(), h.options.get("logit_scale", 1.0)
    means = sum((t.detach().double().softmax(-1) @ weight).abs() for t in (logits, reference))
    products = scale * (h.steered.detach().cpu().double().abs() * means).sum(-1)
    return losses._replace(value_condition=losses.value_condition + products), gradient
