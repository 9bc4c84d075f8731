"""kl_div_from_logits with its gradient, the drop-in for two log_softmax and F.kl_div; "sum", so the upstream is 1."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, compiled, generator, kernel_backends


def eager(logits: Tensor, reference: Tensor) -> Tensor:
    z, r = (logits, reference) if logits.dtype == torch.float64 else (logits.float(), reference.float())
    return F.kl_div(z.log_softmax(-1), r.log_softmax(-1), reduction="sum", log_target=True)


def run(divergence: Callable[[Tensor, Tensor], Tensor], logits: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
    value = divergence(logits, reference)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def fused(logits: Tensor, reference: Tensor) -> Tensor:
    return ops.kl_div_from_logits(logits, reference, reduction="sum")


def rivals(device: torch.device) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Other libraries' kernels for the same result, where they are installed and run."""
    liger = liger_divergence(device, "sum")
    if liger is not None:
        yield "Liger", lambda z, r: liger(z.float().log_softmax(-1), r.float().log_softmax(-1))


def liger_divergence(device: torch.device, reduction: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's KL of two tensors of float32 log-probabilities; None where it is not installed or does not run."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    divergence: Callable[[Tensor, Tensor], Tensor] = importlib.import_module(
        "liger_kernel.transformers"
    ).LigerKLDIVLoss(reduction=reduction, log_target=True)
    return divergence


def make(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    normal = generator()
    reference = normal(rows, width, scale=3.0)
    logits = (reference + normal(rows, width)).to(device, dtype).requires_grad_()
    reference = reference.to(device, dtype)

    def exact() -> tuple[Tensor, ...]:
        return run(eager, logits.detach().double().requires_grad_(), reference.double())

    def terms() -> tuple[float, ...]:
        """The KL is Σ p·log p − Σ p·log q, over all rows."""
        log_p, log_q = (t.detach().double().log_softmax(-1) for t in (reference, logits))
        return (float((log_p.exp() * (log_p + log_q)).abs().sum()), 0.0)

    compiled_eager = compiled(eager)
    variants = [
        Variant("eager", lambda: run(eager, logits, reference)),
        Variant("torch.compile", lambda: run(compiled_eager, logits, reference)),
    ]
    for name, rival in rivals(device):
        variants.append(Variant(name, functools.partial(run, rival, logits, reference)))
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: run(fused, logits, reference), backend))
    size = rows * width
    return Problem(variants, exact, n_bytes=3 * size * dtype.itemsize, flops=10 * size, terms=terms)


def case() -> Case:
    settings = []
    for rows, width in ((64, 49152), (64, 128256)):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{rows} × {width} {str(dtype).split('.')[1]}"
            quick = (width, dtype) == (49152, torch.float32)
            settings.append(Setting(label, functools.partial(make, rows, width, dtype), quick=quick))
    return Case("kl_div", "kl_div_from_logits: value and gradient", settings)
