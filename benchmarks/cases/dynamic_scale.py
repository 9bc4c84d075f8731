"""dynamic_scale: forward, backward, and both. Least traffic an element: forward x and y; backward dy, x and dx."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, compiled, generator, kernel_backends
from .scale_heads import Pass, run


def eager(x: Tensor, weight: Tensor, strength: Tensor) -> Tensor:
    """Products in float32 (of three ways the fastest), each head's factor rounded to x's dtype before it is applied."""
    wide = x if x.dtype == weight.dtype else x.to(weight.dtype)
    alpha = torch.linalg.vecdot(wide, weight)  # [B, T, H]
    return x * (1 + strength[:, None, None] * alpha)[..., None].to(x.dtype)


def fused(x: Tensor, weight: Tensor, strength: Tensor) -> Tensor:
    return ops.dynamic_scale(x, weight, strength=strength)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, which: Pass, device: torch.device) -> Problem:
    normal = generator()
    x, dy = (normal(*shape).to(device, dtype) for _ in range(2))
    weight, strength = (t.to(device) for t in (normal(*shape[2:], scale=shape[3] ** -0.5), normal(shape[0])))
    given = (x.requires_grad_(), weight.requires_grad_(), strength, dy)

    def exact() -> tuple[Tensor, ...]:
        doubled = [t.detach().double() for t in given]
        return run(eager, which, *(t.requires_grad_() for t in doubled[:2]), *doubled[2:])()

    def terms() -> tuple[float, ...]:
        """α is a sum of D products, ⟨x, dy⟩ another; dweight one of B·T terms of that size."""
        h, g, w, beta = (t.detach().double().abs() for t in (x, dy, weight, strength))
        beta = beta[:, None, None]
        alpha, product = (torch.einsum(f"bthd,{a}->bth", h, t) for a, t in (("hd", w), ("bthd", g)))
        y = float((h * (1 + beta * alpha)[..., None]).max())
        dx = float((g * (1 + beta * alpha)[..., None] + (beta * product)[..., None] * w).max())
        dweight = float(torch.einsum("bth,bthd->hd", beta * product, h).max())
        return {"forward": (y,), "backward": (dx, dweight)}.get(which, (y, dx, dweight))

    variants = [Variant("eager", run(eager, which, *given))]
    if which != "backward":  # a compiled backward may not be run twice for one forward
        variants.append(Variant("torch.compile", run(compiled(eager), which, *given)))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", run(fused, which, *given), backend))
    passes, flops = {"forward": (2, 3), "backward": (3, 7), "forward + backward": (5, 10)}[which]
    return Problem(variants, exact, passes * x.numel() * dtype.itemsize, flops * x.numel(), terms)


def case() -> Case:
    settings = []
    whiches: tuple[Pass, ...] = ("forward", "backward", "forward + backward")
    for shape in ((64, 18, 9, 64), (8, 256, 32, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            for which in whiches:
                label = f"{' × '.join(map(str, shape))} {str(dtype).split('.')[1]}, {which}"
                quick = dtype == torch.float32 and which == "forward + backward"
                settings.append(Setting(label, functools.partial(make, shape, dtype, which), quick=quick))
    return Case(
        "dynamic_scale", "dynamic_scale: a probe a head, one strength a row; gradients of x and probe", settings
    )
