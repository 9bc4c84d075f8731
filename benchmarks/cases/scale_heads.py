"""scale_heads: forward, backward, and both. Least traffic an element: forward x and y; backward dy, x and dx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from actscale_fast import ops

from ..case import GPU_ONLY, Case, Problem, Setting, Variant, compiled, generator, kernel_backends

Pass = Literal["forward", "backward", "forward + backward"]


def eager(x: Tensor, alpha: Tensor, strength: Tensor) -> Tensor:
    """One factor a row and head, rounded to x's dtype before the product: one pass over x."""
    factor = 1 + strength[:, None, None] * alpha  # [B, 1, H]
    return x * factor[..., None].to(x.dtype)


def fused(x: Tensor, alpha: Tensor, strength: Tensor) -> Tensor:
    return ops.scale_heads(x, alpha, strength=strength)


def run(
    scale: Callable[..., Tensor], which: Pass, x: Tensor, alpha: Tensor, strength: Tensor, dy: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    if which == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (scale(x, alpha, strength),)

        return forward
    if which == "backward":
        kept: list[Tensor] = []

        def backward() -> tuple[Tensor, ...]:
            if not kept:
                kept.append(scale(x, alpha, strength))
            return torch.autograd.grad(kept[0], (x, alpha), dy, retain_graph=True)

        return backward

    def both() -> tuple[Tensor, ...]:
        y = scale(x, alpha, strength)
        return (y.detach(), *torch.autograd.grad(y, (x, alpha), dy))

    return both


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, which: Pass, device: torch.device) -> Problem:
    normal = generator()
    x, dy = (normal(*shape).to(device, dtype) for _ in range(2))
    alpha, strength = (t.to(device) for t in (normal(1, 1, shape[2], scale=0.5), normal(shape[0])))
    given = (x.requires_grad_(), alpha.requires_grad_(), strength, dy)

    def exact() -> tuple[Tensor, ...]:
        doubled = [t.detach().double() for t in given]
        return run(eager, which, *(t.requires_grad_() for t in doubled[:2]), *doubled[2:])()

    def terms() -> tuple[float, ...]:
        """y and dx are sums of two terms at most; dα of B·T·D products β·x·dy."""
        dalpha = torch.einsum("bthd,bthd,b->h", *(t.detach().double().abs() for t in (x, dy, strength))).max()
        return {"forward": (0.0,), "backward": (0.0, float(dalpha))}.get(which, (0.0, 0.0, float(dalpha)))

    variants = [Variant("eager", run(eager, which, *given))]
    if which != "backward":  # a compiled backward may not be run twice for one forward
        variants.append(Variant("torch.compile", run(compiled(eager), which, *given)))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", run(fused, which, *given), backend))
    passes = {"forward": 2, "backward": 3, "forward + backward": 5}[which]
    return Problem(variants, exact, passes * x.numel() * dtype.itemsize, passes * x.numel(), terms)


def case() -> Case:
    settings = []
    whiches: tuple[Pass, ...] = ("forward", "backward", "forward + backward")
    for shape in ((64, 18, 9, 64), (8, 256, 32, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            for which in whiches:
                label = f"{' × '.join(map(str, shape))} {str(dtype).split('.')[1]}, {which}"
                quick = dtype == torch.float32 and which == "forward + backward"
                settings.append(Setting(label, functools.partial(make, shape, dtype, which), quick=quick))
    for which in ("forward", "backward"):
        label = f"16 × 512 × 32 × 128 bfloat16, {which}"
        build = functools.partial(make, (16, 512, 32, 128), torch.bfloat16, which)
        settings.append(Setting(label, build, devices=GPU_ONLY))
    return Case("scale_heads", "scale_heads: one scalar a head, one strength a row; gradients of x and α", settings)
