"""What the tests of the losses from hidden states share: random heads, and the losses by their definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from op_cases import ROUNDINGS, Inputs, Losses, Rows, assert_as_exact_as_eager, textbook_losses
from torch import Tensor

from actscale_fast import ops


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
    h, upstream = h.to(torch.device("cpu")), (upstream[0].cpu(), upstream[1].cpu())
    leaf = h.steered.detach().to(dtype).requires_grad_()
    logits = logits_of(h, leaf, dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    reference = logits_of(h, h.frozen, dtype)
    rows = Rows(logits.detach(), reference, h.correct, h.wrong, h.direction)
    losses = textbook_losses(rows, upstream, wide, **options)
    (gradient,) = torch.autograd.grad(logits, leaf, losses.gradient.to(logits.dtype))
    # The KL is H(q) − H(p) + s·h·(Wᵀq − Wᵀp): beside the terms of the definition, those of two products of d terms.
    weight, scale, size = h.weight.double(), h.options.get("logit_scale", 1.0), h.steered.detach().double().abs()
    means = sum((t.detach().double().softmax(-1) @ weight).abs() for t in (logits, reference))
    products = scale * (size * means).sum(-1)
    value, of_gradient = losses.value_condition + products, scale * losses.gradient_condition @ weight.abs()  # [N, d]
    if h.steered.dtype in (torch.bfloat16, torch.float16) and ops.get_backend() != "cpu":
        # The weights of the mean of W's rows are rounded to 16 bits (cut off by Triton's interpreter): an ulp of each,
        # in the value times the way from the frozen to the steered hidden state.
        step = torch.finfo(h.steered.dtype).eps / (ROUNDINGS / 4 * torch.finfo(torch.float32).eps)
        way = (h.steered.detach().double() - h.frozen.double()).abs()
        value = value + step * scale * (way * (reference.double().softmax(-1) @ weight.abs())).sum(-1)
        both = sum(t.detach().double().softmax(-1) @ weight.abs() for t in (logits, reference))
        of_gradient = of_gradient + step * scale * upstream[1].double().abs()[:, None] * both
    return losses._replace(value_condition=value, gradient_condition=of_gradient), gradient


def run(
    h: Head,
    upstream: tuple[Tensor, Tensor] | None = None,
    *,
    margin: float = 1.0,
    chunk_bytes: int = 1 << 28,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, gradient of the steered hidden states)."""
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head, chunk_bytes=chunk_bytes, **how)
    leaf = h.steered.detach().requires_grad_()
    losses = ops.linear_intervention_loss(
        leaf, h.weight, statistics, *h.answers, direction=h.direction, margin=margin, chunk_bytes=chunk_bytes,
        **h.of_head, **how,
    )  # fmt: skip
    ones = torch.ones(len(leaf), device=leaf.device)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream or (ones, ones))
    return losses[0].detach(), losses[1].detach(), gradient


def size_of_products(h: Head) -> Tensor:
    """[N]: Σ|h_k·W_k| of the two answers' logits, the terms whose difference the hinge takes."""
    h = h.to(torch.device("cpu"))
    rows = h.weight[torch.stack(h.answers, 1)].double().abs()  # [N, 2, d]
    return h.options.get("logit_scale", 1.0) * torch.einsum("nd,nad->n", h.steered.detach().double().abs(), rows)


def check(
    h: Head, upstream: tuple[Tensor, Tensor], *, margin: float = 1.0, chunk_bytes: int = 1 << 28, **how: Any
) -> None:
    """Values and gradient against float64, within twice the error of eager PyTorch of the same dtype."""
    got = run(h, upstream, margin=margin, chunk_bytes=chunk_bytes, **how)
    exact, exact_gradient = textbook(h, upstream, torch.float64, margin=margin, **how)
    eager, eager_gradient = textbook(h, upstream, h.steered.dtype, margin=margin, **how)
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (torch.float32, torch.float32, h.steered.dtype)
    assert_as_exact_as_eager(
        "effectiveness", got[0], exact.effectiveness, eager.effectiveness, condition=size_of_products(h)
    )
    assert_as_exact_as_eager(
        "faithfulness", got[1], exact.faithfulness, eager.faithfulness, condition=exact.value_condition
    )
    assert_as_exact_as_eager("gradient", got[2], exact_gradient, eager_gradient, condition=exact.gradient_condition)
