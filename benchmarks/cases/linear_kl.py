"""linear_kl_div: the mean KL of a student and a teacher from their hidden states, and the student's gradients.

Least traffic: each head read once, the hidden states, and the gradients written. Least operations: two matrix products
for the logits and one for each gradient, of the rows that are not ignored. The rivals hold [N, V] tensors, several of
them. "bare matrix products" is a yardstick: those products of all rows that count, and nothing between them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actscale_fast import ops

from ..case import GPU_ONLY, Case, Problem, Setting, Variant, compiled, generator, kernel_backends

IGNORED = -100
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Inputs:
    """Hidden states [N, d] and heads [V, d] of both models, and labels [N]; gradients are taken of `leaves`."""

    hidden: Tensor
    weight: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    labels: Tensor
    learns: bool

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] if self.learns else [self.hidden]

    def to(self, dtype: torch.dtype) -> Inputs:
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (self.hidden, self.weight))
        other, other_weight = (t.to(dtype) for t in (self.reference_hidden, self.reference_weight))
        return Inputs(hidden, weight, other, other_weight, self.labels, self.learns)


def eager(hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, labels: Tensor) -> Tensor:
    z, r = F.linear(hidden, weight), F.linear(reference_hidden, reference_weight)
    if z.dtype != torch.float64:
        z, r = z.float(), r.float()
    log_q, log_p = (z / TEMPERATURE).log_softmax(-1), (r / TEMPERATURE).log_softmax(-1)
    kept = labels != IGNORED
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return torch.where(kept, rows, 0.0).sum() / kept.sum()


def picked(
    hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, labels: Tensor
) -> Tensor:
    """The rows that count gathered first."""
    kept = labels != IGNORED
    return eager(hidden[kept], weight, reference_hidden[kept], reference_weight, labels[kept])


def fused(hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, labels: Tensor) -> Tensor:
    return ops.linear_kl_div(
        hidden, weight, reference_hidden, reference_weight, temperature=TEMPERATURE, labels=labels, reduction="mean"
    )


def from_logits(
    hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, labels: Tensor
) -> Tensor:
    """The fused loss of whole logits."""
    z, r = F.linear(hidden, weight), F.linear(reference_hidden, reference_weight)
    return ops.kl_div_from_logits(z, r, temperature=TEMPERATURE, labels=labels, reduction="mean", inplace_gradient=True)


def run(divergence: object, given: Inputs) -> tuple[Tensor, ...]:
    weight = given.weight if given.learns else given.weight.detach()
    value = divergence(given.hidden, weight, given.reference_hidden, given.reference_weight, given.labels)  # type: ignore[operator]
    return value.detach(), *torch.autograd.grad(value, given.leaves)


@torch.no_grad()
def products(given: Inputs) -> tuple[Tensor, ...]:
    kept = given.labels != IGNORED
    hidden = given.hidden[kept]
    z = F.linear(hidden, given.weight)
    F.linear(given.reference_hidden[kept], given.reference_weight)
    return (z @ given.weight, z.t() @ hidden) if given.learns else (z @ given.weight,)


def make(
    rows: int, width: int, teacher_width: int, vocab: int, dtype: torch.dtype, learns: bool, half: bool,
    device: torch.device,
) -> Problem:  # fmt: skip
    normal = generator()
    sides = []
    for d in (width, teacher_width):
        sides += [normal(rows, d).to(device, dtype), normal(vocab, d, scale=3 / d**0.5).to(device, dtype)]
    labels = torch.arange(rows, device=device)
    if half:
        labels[::2] = IGNORED
    for leaf in sides[:2]:
        leaf.requires_grad_()
    hidden, weight, other, other_weight = sides
    given = Inputs(hidden, weight, other, other_weight, labels, learns)
    counted = rows // 2 if half else rows

    def exact() -> tuple[Tensor, ...]:
        return run(eager, given.to(torch.float64))

    def terms() -> tuple[float, ...]:
        """A logit is a sum of d products; the KL is Σ p·log p − Σ p·log q; gradients are sums over V, and over rows."""
        wide = given.to(torch.float64)
        kept = labels != IGNORED
        with torch.no_grad():
            log_p, log_q = (
                (F.linear(h[kept], w) / TEMPERATURE).log_softmax(-1)
                for h, w in ((wide.reference_hidden, wide.reference_weight), (wide.hidden, wide.weight))
            )
            both = (log_p.exp() + log_q.exp()) / counted / TEMPERATURE
            value = (log_p.exp() * (log_p + log_q)).abs().sum(-1).mean()
            sizes = [value, (both @ wide.weight.abs()).max(), (both.t() @ wide.hidden[kept].abs()).max()]
        return tuple(float(size) for size in sizes[: 2 + learns])

    compiled_eager = compiled(eager)
    variants = [
        Variant("eager", lambda: run(eager, given)),
        Variant("torch.compile", lambda: run(compiled_eager, given)),
    ]
    if half:
        variants.insert(1, Variant("eager, rows picked", lambda: run(picked, given)))
    for backend in kernel_backends(device):
        name = f"logits + kl_div_from_logits {backend}"
        variants.append(Variant(name, lambda: run(from_logits, given), backend))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: run(fused, given), backend))
    variants.append(Variant("bare matrix products", functools.partial(products, given), checked=False))
    moved = sum(t.numel() for t in sides) + given.hidden.numel() + (given.weight.numel() if learns else 0)
    flops = 2 * counted * vocab * (width * (3 if learns else 2) + teacher_width) + 10 * counted * vocab
    return Problem(variants, exact, moved * dtype.itemsize, flops, terms=terms, dtype=dtype)


def case() -> Case:
    settings = []
    for dtype, learns, half in (
        (torch.float32, False, False), (torch.float32, True, False), (torch.float32, True, True),
        (torch.bfloat16, True, True),
    ):  # fmt: skip
        label = f"256 × 576, V = 49152 {str(dtype).split('.')[1]}"
        label += (", head learns" if learns else ", head frozen") + (", half of the rows ignored" if half else "")
        build = functools.partial(make, 256, 576, 960, 49152, dtype, learns, half)
        settings.append(Setting(label, build, quick=(dtype, half) == (torch.float32, True)))
    build = functools.partial(make, 8192, 2048, 4096, 128256, torch.bfloat16, True, True)
    label = "8192 × 2048, V = 128256 bfloat16 (Llama-3.2-1B from 8B), head learns, half of the rows ignored"
    settings.append(Setting(label, build, devices=GPU_ONLY))
    return Case("linear_kl", "linear_kl_div: the mean KL and the student's gradients", settings)
