"""linear_intervention_loss: both losses and the gradient of the hidden states, straight from hidden states and head.

Least traffic: read W once, the hidden states and what is kept of the reference, write the gradient. Least operations:
two matrix products, 4·N·V·d. The rivals hold [N, V] logits; the frozen model's side is computed beforehand in all of
them: log-probabilities [N, V] for PyTorch, logits [N, V] for the loss of logits, d floats a row for the loss of hidden
states. "bare matrix products" is a yardstick: W·h and its transpose's product, and nothing between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from actscale_fast import ops

from ..case import (
    DISTINCT_ROWS,
    GPU_ONLY,
    Case,
    Problem,
    Setting,
    Variant,
    by_rows,
    compiled,
    generator,
    kernel_backends,
    repeated,
)
from .loss import MARGIN, log_probabilities, weighted


def eager(
    hidden: Tensor, weight: Tensor, log_p: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    """(Σ u·losses, effectiveness, faithfulness); autograd carries the gradient back through the head."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return weighted(logits, log_p, answers, direction, u_e, u_f)


def run(losses: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    total, effectiveness, faithfulness = losses(hidden, *rest)
    (gradient,) = torch.autograd.grad(total, hidden)
    return effectiveness.detach(), faithfulness.detach(), gradient


def from_logits(
    hidden: Tensor, weight: Tensor, reference: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    """The fused loss of whole logits."""
    losses = ops.intervention_loss(
        F.linear(hidden, weight), reference, answers[:, 0], answers[:, 1], direction=direction, margin=MARGIN
    )
    (gradient,) = torch.autograd.grad(losses, hidden, (u_e, u_f))
    return losses[0].detach(), losses[1].detach(), gradient


class FromHidden:
    """The loss of hidden states, with the reference's statistics from the backend that runs it."""

    def __init__(self, frozen: Tensor, hidden: Tensor, weight: Tensor, answers: Tensor, *rest: Tensor) -> None:
        self.hidden, self.weight, self.answers = hidden, weight, (answers[:, 0].clone(), answers[:, 1].clone())
        self.frozen, (self.direction, *self.upstream) = frozen, rest
        self.statistics: ops.ReferenceStatistics | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.statistics is None:
            self.statistics = ops.reference_statistics(self.frozen, self.weight, *self.answers)
        losses = ops.linear_intervention_loss(
            self.hidden, self.weight, self.statistics, *self.answers, direction=self.direction, margin=MARGIN
        )
        (gradient,) = torch.autograd.grad(losses, self.hidden, self.upstream)
        return losses[0].detach(), losses[1].detach(), gradient


def make(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
    normal = generator()
    distinct = min(rows, DISTINCT_ROWS)
    frozen = normal(distinct, width)
    hidden = repeated((frozen + normal(distinct, width, scale=1 / 3)).to(device, dtype), rows).requires_grad_()
    frozen = repeated(frozen.to(device, dtype), rows)
    weight = normal(vocab, width, scale=3 / width**0.5).to(device, dtype)
    answers = torch.arange(2 * rows).view(rows, 2).mul(37).remainder(vocab).to(device)  # different in each row
    direction = torch.tensor([1.0, -1.0], device=device).repeat(rows)[:rows]
    rest = (answers, direction, *(torch.ones(rows, device=device) for _ in range(2)))
    reference = F.linear(frozen, weight)
    (log_p,) = by_rows(lambda r, a: (log_probabilities(r.float(), a),), reference, answers, width=vocab)

    def exact() -> tuple[Tensor, ...]:
        wide = weight.double()

        def of_rows(h: Tensor, f: Tensor, answers: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            log_p = log_probabilities(F.linear(f.double(), wide), answers)
            return run(eager, h.double().requires_grad_(), wide, log_p, answers, *(t.double() for t in others))

        return by_rows(of_rows, hidden.detach(), frozen, *rest, width=vocab)

    def terms() -> tuple[float, ...]:
        """A logit is a sum of d products; the KL is Σ p·log p − Σ p·log q; its gradient two means of W's rows."""
        wide = weight.double()

        def of_rows(h: Tensor, f: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
            log_p, log_q = (log_probabilities(F.linear(t.double(), wide), answers) for t in (f, h))
            p, q = log_p.exp(), log_q.exp()
            products = (h.double().abs()[:, None] * wide[answers].abs()).sum((1, 2))
            entropies = (p * (log_p + log_q)).abs().nan_to_num().sum(-1)
            return products, entropies + products, ((p + q) @ wide.abs() + wide[answers].abs().sum(1)).amax(-1)

        sizes = by_rows(of_rows, hidden.detach(), frozen, answers, width=vocab)
        return tuple(float(size.max()) for size in sizes)

    given = (hidden, weight, log_p, *rest)
    compiled_eager = compiled(eager)
    variants = [
        Variant("eager", lambda: run(eager, *given)),
        Variant("torch.compile", lambda: run(compiled_eager, *given)),
    ]
    for backend in kernel_backends(device):
        name = f"logits + intervention_loss {backend}"
        variants.append(Variant(name, lambda: from_logits(hidden, weight, reference, *rest), backend))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", FromHidden(frozen, hidden, weight, *rest), backend))
    variants.append(Variant("bare matrix products", functools.partial(products, hidden, weight), checked=False))
    n_bytes = (weight.numel() + 2 * hidden.numel()) * dtype.itemsize + 4 * hidden.numel()
    return Problem(variants, exact, n_bytes, flops=4 * rows * vocab * width + 10 * rows * vocab, terms=terms)


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.linear(hidden, weight) @ weight,)


def case() -> Case:
    settings = []
    for rows, dtype in ((16, torch.float32), (64, torch.float32), (64, torch.bfloat16), (64, torch.float16)):
        label = f"{rows} × 576, V = 49152 {str(dtype).split('.')[1]} (SmolLM2-135M)"
        settings.append(Setting(label, functools.partial(make, rows, 576, 49152, dtype), quick=rows == 16))
    for dtype in (torch.float32, torch.bfloat16):
        label = f"32 × 2048, V = 128256 {str(dtype).split('.')[1]} (Llama-3.2-1B)"
        settings.append(Setting(label, functools.partial(make, 32, 2048, 128256, dtype)))
    for rows in (16, 128, 8192):
        build = functools.partial(make, rows, 4096, 128256, torch.bfloat16)
        settings.append(Setting(f"{rows} × 4096, V = 128256 bfloat16 (Llama-3-8B)", build, devices=GPU_ONLY))
    return Case("linear", "linear_intervention_loss: both losses and the gradient of the hidden states", settings)
