"""intervention_loss with its gradient: hinge on two answers and KL over the other tokens, from two tensors of logits.

Least traffic an element: read both logits, write the gradient. Ours moves exactly that where the upstream gradient of
the KL is 1, or where its weights are given to the forward pass (`weights beforehand`); any other upstream costs one
more read and write of the gradient. Both are shown in settings of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
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
from .kl_div import liger_divergence

MARGIN = 4.0
SCALED = "Upstream gradients other than 1 cost the fused op one more pass over the gradient; weights beforehand do not."


def hinge(z: Tensor, answers: Tensor, direction: Tensor) -> Tensor:
    chosen = z.gather(1, answers)
    return torch.relu(MARGIN - direction * (chosen[:, 0] - chosen[:, 1]))


def log_probabilities(logits: Tensor, answers: Tensor) -> Tensor:
    """log softmax without the answers. The smallest finite number instead of −inf saves the pass that removes NaN."""
    return logits.scatter(1, answers, torch.finfo(logits.dtype).min).log_softmax(-1)


def weighted(
    z: Tensor, log_p: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    """(Σ u·losses, effectiveness, faithfulness) from float logits and the reference's log-probabilities."""
    effectiveness = hinge(z, answers, direction)
    log_q = log_probabilities(z, answers)
    faithfulness = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (effectiveness * u_e + faithfulness * u_f).sum(), effectiveness, faithfulness


def from_scratch(
    logits: Tensor, reference: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    z, r = (logits, reference) if logits.dtype == torch.float64 else (logits.float(), reference.float())
    return weighted(z, log_probabilities(r, answers), answers, direction, u_e, u_f)


def from_cache(logits: Tensor, log_p: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return weighted(logits.float(), log_p, *rest)


def liger(
    divergence: Callable[[Tensor, Tensor], Tensor], logits: Tensor, reference: Tensor, answers: Tensor,
    direction: Tensor, u_e: Tensor, u_f: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Liger's kernel takes log-probabilities and gives a term a token: what makes them, and the rows' sums, count."""
    z = logits.float()
    effectiveness = hinge(z, answers, direction)
    terms = divergence(log_probabilities(z, answers), log_probabilities(reference.float(), answers))
    faithfulness = terms.sum(-1)
    return (effectiveness * u_e + faithfulness * u_f).sum(), effectiveness, faithfulness


def run(losses: Callable[..., tuple[Tensor, ...]], logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    total, effectiveness, faithfulness = losses(logits, *rest)
    (gradient,) = torch.autograd.grad(total, logits)
    return effectiveness.detach(), faithfulness.detach(), gradient


def fused(
    logits: Tensor, reference: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    losses = ops.intervention_loss(logits, reference, answers[:, 0], answers[:, 1], direction=direction, margin=MARGIN)
    (gradient,) = torch.autograd.grad(losses, logits, (u_e, u_f))
    return losses[0].detach(), losses[1].detach(), gradient


def fused_with_weights(
    logits: Tensor, reference: Tensor, answers: Tensor, direction: Tensor, u_e: Tensor, u_f: Tensor
) -> tuple[Tensor, ...]:
    effectiveness, faithfulness, loss = ops.intervention_loss(
        logits, reference, answers[:, 0], answers[:, 1], direction=direction, margin=MARGIN, weights=(u_e, u_f)
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return effectiveness, faithfulness, gradient


def make(rows: int, width: int, dtype: torch.dtype, uniform: bool, device: torch.device) -> Problem:
    normal = generator()
    distinct = min(rows, DISTINCT_ROWS)
    reference = normal(distinct, width, scale=3.0)
    logits = repeated((reference + normal(distinct, width)).to(device, dtype), rows).requires_grad_()
    reference = repeated(reference.to(device, dtype), rows)
    answers = torch.arange(2 * rows).view(rows, 2).mul(37).remainder(width).to(device)  # different in each row
    direction = torch.tensor([1.0, -1.0], device=device).repeat(rows)[:rows]
    upstream = [torch.ones(rows) if uniform else normal(rows).abs() + 0.1 for _ in range(2)]
    rest = (answers, direction, *(u.to(device) for u in upstream))
    log_p = log_probabilities(reference.float(), answers)

    def exact() -> tuple[Tensor, ...]:
        def of_rows(z: Tensor, r: Tensor, answers: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            return run(from_scratch, z.double().requires_grad_(), r.double(), answers, *(t.double() for t in others))

        return by_rows(of_rows, logits.detach(), reference, *rest, width=width)

    def terms() -> tuple[float, ...]:
        """The KL is Σ p·log p − Σ p·log q."""

        def of_rows(z: Tensor, r: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
            log_p, log_q = (log_probabilities(t.double(), answers) for t in (r, z))
            return ((log_p.exp() * (log_p + log_q)).abs().nan_to_num().sum(-1),)

        return (0.0, float(by_rows(of_rows, logits.detach(), reference, answers, width=width)[0].max()), 0.0)

    compiled_scratch, compiled_cached = compiled(from_scratch), compiled(from_cache)
    variants = [
        Variant("eager", lambda: run(from_scratch, logits, reference, *rest)),
        Variant("eager, cached reference", lambda: run(from_cache, logits, log_p, *rest)),
        Variant("torch.compile", lambda: run(compiled_scratch, logits, reference, *rest)),
        Variant("torch.compile, cached reference", lambda: run(compiled_cached, logits, log_p, *rest)),
    ]
    divergence = liger_divergence(device, "none")
    if divergence is not None:
        variants.append(
            Variant("Liger's KL", lambda: run(functools.partial(liger, divergence), logits, reference, *rest))
        )
    for backend in kernel_backends(device):
        name = f"actscale_fast {backend}"
        variants.append(Variant(name, lambda: fused(logits, reference, *rest), backend))
        if not uniform:
            known = functools.partial(fused_with_weights, logits, reference, *rest)
            variants.append(Variant(f"{name}, weights beforehand", known, backend))
    size = rows * width
    return Problem(variants, exact, n_bytes=3 * size * dtype.itemsize, flops=12 * size, terms=terms)


def case() -> Case:
    settings = []
    for rows, width in ((64, 49152), (32, 128256), (64, 128256)):
        for dtype in (torch.float32, torch.bfloat16):
            for uniform in (True, False) if (rows, width) == (64, 49152) else (True,):
                label = f"{rows} × {width} {str(dtype).split('.')[1]}{'' if uniform else ', upstream by row'}"
                build = functools.partial(make, rows, width, dtype, uniform)
                quick = (rows, width, dtype) == (64, 49152, torch.float32)
                settings.append(Setting(label, build, note="" if uniform else SCALED, quick=quick))
    few, widths = [(32, 50257), (128, 50257), (128, 128256)], (32000, 50257, 128256, 151936, 262144)
    for rows, width in few + [(8192, width) for width in widths]:
        build = functools.partial(make, rows, width, torch.bfloat16, True)
        settings.append(Setting(f"{rows} × {width} bfloat16", build, devices=GPU_ONLY))
    return Case("loss", "intervention_loss: both losses and the gradient", settings)
