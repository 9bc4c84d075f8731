"""What one call costs where the data are nothing: one token at GPT-2's size (12 heads of 64), short rows of logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from . import loss, scale_heads


def scaling(which: scale_heads.Pass, strength: float | None, device: torch.device) -> Problem:
    normal = generator()
    x, dy = (normal(1, 1, 12, 64).to(device) for _ in range(2))
    alpha = normal(1, 1, 12).to(device)
    beta = torch.ones(1, device=device)
    given = (x.requires_grad_(), alpha.requires_grad_(), beta, dy)

    def eager(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        if strength is not None:
            return x * (1 + strength * alpha)[..., None]
        return scale_heads.eager(x, alpha, beta)

    def fused(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return scale_heads.ops.scale_heads(x, alpha, strength=beta if strength is None else strength)

    def calls(scale: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        return scale_heads.run(scale, which, *tensors)  # type: ignore[arg-type]

    def exact() -> tuple[Tensor, ...]:
        doubled = [t.detach().double() for t in given]
        return calls(eager, (*(t.requires_grad_() for t in doubled[:2]), *doubled[2:]))()

    def terms() -> tuple[float, ...]:
        """y and dx are sums of two terms at most; dα of D products x·dy (β is 1)."""
        dalpha = (x.detach() * dy).double().abs().sum(-1).max()
        return (0.0,) if which == "forward" else (0.0, 0.0, float(dalpha))

    variants = [Variant("eager", calls(eager, given))]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", calls(fused, given), backend))
    return Problem(variants, exact, n_bytes=5 * 4 * x.numel(), flops=5 * x.numel(), terms=terms)


def short_loss(device: torch.device) -> Problem:
    """The loss case at 2 × 64: nothing but dispatch; torch.compile left out, its guards are another subject."""
    problem = loss.make(2, 64, torch.float32, True, device)
    kept = [variant for variant in problem.variants if not variant.name.startswith("torch.compile")]
    return dataclasses.replace(problem, variants=kept)


def case() -> Case:
    settings = [
        Setting("scale_heads, no gradient, strength a number", functools.partial(scaling, "forward", 1.0), quick=True),
        Setting("scale_heads, no gradient, strength a row", functools.partial(scaling, "forward", None)),
        Setting("scale_heads, forward + backward", functools.partial(scaling, "forward + backward", None), quick=True),
        Setting("intervention_loss and gradient, 2 × 64", short_loss, quick=True),
    ]
    return Case("overhead", "Cost of a call at GPT-2's size, 1 × 1 × 12 × 64", settings, unit="us", bandwidth=False)
