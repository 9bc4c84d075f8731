"""kl_div_from_logits with its gradient, the drop-in for two log_softmax and F.kl_div.

Least traffic an element: read both logits, write the gradient; of an ignored row, write the gradient. "mean afterwards"
is ours with the division outside, as an upstream gradient other than 1: one more read and write of the gradient.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, compiled, generator, kernel_backends

IGNORED = -100
Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """Which divergence: the sum over all rows, or the mean over those that are not ignored."""

    mean: bool = False
    temperature: float = 1.0
    softcap: float | None = None
    half: bool = False  # of the rows is ignored

    def capped(self, logits: Tensor) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1 else z / self.temperature

    def eager(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = self.capped(logits).log_softmax(-1), self.capped(reference).log_softmax(-1)
        if not self.half:
            total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            return total / len(labels) if self.mean else total
        kept = labels != IGNORED
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return torch.where(kept, rows, 0.0).sum() / kept.sum()

    def picked(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        """The rows that count gathered first."""
        kept = labels != IGNORED
        log_q, log_p = (self.capped(side[kept]).log_softmax(-1) for side in (logits, reference))
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / kept.sum()

    def fused(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        return self._ours(logits, reference, labels, reduction="mean" if self.mean else "sum")

    def afterwards(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        return self._ours(logits, reference, labels, reduction="none").mean()

    def _ours(self, logits: Tensor, reference: Tensor, labels: Tensor, **reduction: Any) -> Tensor:
        return ops.kl_div_from_logits(
            logits, reference, temperature=self.temperature, softcap=self.softcap, labels=labels if self.half else None,
            **reduction,
        )  # fmt: skip


def run(divergence: Divergence, logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    value = divergence(logits, *rest)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def rivals(device: torch.device, form: Form) -> Iterator[tuple[str, Divergence]]:
    """Other libraries' kernels for the same result, where they are installed and run."""
    liger = liger_divergence(device, "sum") if form == Form() else None
    if liger is not None:
        yield "Liger", lambda z, r, _: liger(z.float().log_softmax(-1), r.float().log_softmax(-1))


def liger_divergence(device: torch.device, reduction: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's KL of two tensors of float32 log-probabilities; None where it is not installed or does not run."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    divergence: Callable[[Tensor, Tensor], Tensor] = importlib.import_module(
        "liger_kernel.transformers"
    ).LigerKLDIVLoss(reduction=reduction, log_target=True)
    return divergence


def make(rows: int, width: int, dtype: torch.dtype, device: torch.device, form: Form = Form()) -> Problem:
    normal = generator()
    reference = normal(rows, width, scale=3.0)
    logits = (reference + normal(rows, width)).to(device, dtype).requires_grad_()
    reference = reference.to(device, dtype)
    labels = torch.arange(rows, device=device)
    if form.half:
        labels[::2] = IGNORED
    given = (logits, reference, labels)

    def exact() -> tuple[Tensor, ...]:
        return run(form.eager, logits.detach().double().requires_grad_(), reference.double(), labels)

    def terms() -> tuple[float, ...]:
        """The KL is Σ p·log p − Σ p·log q, over all rows that count."""
        kept = labels != IGNORED
        log_p, log_q = (form.capped(t.detach()[kept].double()).log_softmax(-1) for t in (reference, logits))
        size = float((log_p.exp() * (log_p + log_q)).abs().sum())
        return (size / len(log_p) if form.mean else size, 0.0)

    compiled_eager = compiled(form.eager)
    variants = [
        Variant("eager", lambda: run(form.eager, *given)),
        Variant("torch.compile", lambda: run(compiled_eager, *given)),
    ]
    if form.half:
        variants.insert(1, Variant("eager, rows picked", lambda: run(form.picked, *given)))
    for name, rival in rivals(device, form):
        variants.append(Variant(name, functools.partial(run, rival, *given)))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: run(form.fused, *given), backend))
        if form.mean and not form.half:
            name = f"actscale_fast {backend}, mean afterwards"
            variants.append(Variant(name, lambda: run(form.afterwards, *given), backend))
    size = rows * width
    moved = 2 if form.half else 3
    return Problem(variants, exact, n_bytes=moved * size * dtype.itemsize, flops=10 * size, terms=terms)


FORMS = {
    "": Form(),
    ", mean": Form(mean=True),
    ", mean of half of the rows, T = 2": Form(mean=True, temperature=2.0, half=True),
    ", soft-cap 30": Form(softcap=30.0),
}


def case() -> Case:
    settings = []
    for rows, width in ((64, 49152), (64, 128256)):
        for dtype in (torch.float32, torch.bfloat16):
            for name, form in FORMS.items():
                if form != Form() and width != 49152:
                    continue
                label = f"{rows} × {width} {str(dtype).split('.')[1]}{name}"
                build = functools.partial(make, rows, width, dtype, form=form)
                settings.append(Setting(label, build, quick=(width, dtype) == (49152, torch.float32)))
    return Case("kl_div", "kl_div_from_logits: value and gradient", settings)
