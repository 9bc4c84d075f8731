"""proximal_adam_: Adam and the soft threshold. Least traffic a scalar: α, m, v read and written, the gradient read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends

LR, BETAS, EPS, L1 = 0.03, (0.9, 0.999), 1e-8, 0.01
#: Steps between two resets of the state, so that thousands of timed steps stay in ordinary numbers.
PERIOD = 500


def threshold_(parameter: Tensor, second: Tensor, correction: float) -> None:
    """The soft threshold at lr·λ/(√v̂ + ε), in place."""
    rate = LR / ((second / correction).sqrt_() + EPS)
    parameter.copy_(torch.nn.functional.softshrink(parameter / rate, L1) * rate)


class TorchAdam:
    """torch.optim.Adam (its fused or foreach form) and the threshold after it: what one writes with PyTorch alone."""

    def __init__(self, start: Tensor, gradient: Tensor, **form: bool) -> None:
        self.start, self.form = start, form
        self.parameter = start.clone().requires_grad_()
        self.parameter.grad = gradient
        self.taken = PERIOD

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        if self.taken == PERIOD:
            self.parameter.copy_(self.start)
            self.optimizer, self.taken = torch.optim.Adam([self.parameter], lr=LR, betas=BETAS, eps=EPS, **self.form), 0
        self.optimizer.step()
        self.taken += 1
        threshold_(self.parameter, self.optimizer.state[self.parameter]["exp_avg_sq"], 1 - BETAS[1] ** self.taken)
        return (self.parameter,)


class Fused:
    def __init__(self, start: Tensor, gradient: Tensor) -> None:
        self.start, self.gradient, self.taken = start, gradient, PERIOD
        self.state = [torch.empty_like(start) for _ in range(3)]
        self.step = torch.zeros((), device=start.device)

    def __call__(self) -> tuple[Tensor, ...]:
        parameter, first, second = self.state
        if self.taken == PERIOD:
            parameter.copy_(self.start)
            for moment in (first, second, self.step):
                moment.zero_()
            self.taken = 0
        ops.proximal_adam_(parameter, self.gradient, first, second, self.step, lr=LR, betas=BETAS, eps=EPS, l1=L1)
        self.taken += 1
        return (parameter,)


def make(shape: tuple[int, ...], device: torch.device) -> Problem:
    normal = generator()
    start, gradient = (normal(*shape, scale=scale).to(device) for scale in (0.1, 0.3))

    def exact() -> tuple[Tensor, ...]:
        return TorchAdam(start.double(), gradient.double())()

    forms: list[tuple[str, Callable[[], tuple[Tensor, ...]]]] = [
        ("eager", TorchAdam(start, gradient)),
        ("eager, fused Adam", TorchAdam(start, gradient, fused=True)),
    ]
    variants = [Variant(name, call) for name, call in forms]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", Fused(start, gradient), backend))
    n = start.numel()
    return Problem(variants, exact, n_bytes=7 * 4 * n, flops=16 * n)


def case() -> Case:
    shapes = {
        "30 × 9 (SmolLM2-135M)": (30, 1, 9),
        "32 × 32 (Llama-3-8B)": (32, 1, 32),
        "32 × 4096 × 32": (32, 4096, 32),
    }
    settings = [Setting(label, functools.partial(make, s), quick=i == 0) for i, (label, s) in enumerate(shapes.items())]
    return Case("proximal", "proximal_adam_: one step of the scalars", settings, unit="us")
