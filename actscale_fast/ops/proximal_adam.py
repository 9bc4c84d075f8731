"""The update of the scalars: Adam and the proximal step of the ℓ1 norm, one launch for all scalars."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks, reference
from .registry import define

_adam_op_ = define(
    "proximal_adam_(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!) step, float lr, float beta1, float beta2, float eps, float l1) -> ()"
)


@torch.no_grad()
def proximal_adam_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l1: float = 0.0,
) -> None:
    """One Adam step and the soft threshold of λ‖·‖₁ in Adam's metric, in place; zeros become exact.

    Adam (arXiv 1412.6980) moves by lr·m̂/(√v̂ + ε); the proximal operator of λ‖·‖₁ in the metric of that step thresholds
    each entry at lr·λ/(√v̂ + ε).

    Args:
        parameter, gradient, exp_avg, exp_avg_sq: float32 contiguous, of one shape and device (float64 through the
            reference backend). A graph that has saved one of them raises in its backward.
        step: float32 [], the number of steps taken so far, on the same device; incremented, so that graphs capture it.
        lr, betas, eps: Adam's; lr > 0.
        l1: λ ≥ 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or range.
    """
    checks.floating_tensor("parameter", parameter, "of any shape")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"parameter: got dtype {parameter.dtype}, expected float32 (float64 with the reference backend)"
        )
    for name, value in (("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        checks.same_device(name, checks.floating_tensor(name, value, "like parameter"), parameter.device)
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (value, parameter))
            raise ValueError(f"{name}: got {got}, expected {expected} as parameter is")
    if not isinstance(step, Tensor):
        raise TypeError(f"step: got {type(step).__name__}, expected a float32 tensor []")
    checks.same_device("step", step, parameter.device)
    if step.shape != () or step.dtype != torch.float32:
        raise ValueError(f"step: got {tuple(step.shape)} {step.dtype}, expected a float32 tensor []")
    lr, eps, l1 = checks.number("lr", lr), checks.number("eps", eps), checks.number("l1", l1)
    betas = checks.number("betas", betas[0]), checks.number("betas", betas[1])
    if not (lr > 0 and l1 >= 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(
            f"lr, l1, eps, betas: got {lr}, {l1}, {eps}, {betas}, expected lr, eps > 0, l1 >= 0, betas in [0, 1)"
        )
    tensors = (parameter, gradient, exp_avg, exp_avg_sq)
    if backends.serving("proximal_adam_", parameter) == "reference":
        reference.proximal_adam_(*tensors, step, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, l1=l1)
        return
    if not all(tensor.is_contiguous() for tensor in (parameter, exp_avg, exp_avg_sq)):
        raise ValueError("parameter, exp_avg, exp_avg_sq: got a strided tensor, expected contiguous ones")
    _adam_op_(parameter, gradient.contiguous(), exp_avg, exp_avg_sq, step, lr, *betas, eps, l1)
    if not torch.compiler.is_compiling():  # a trace knows what the op changes; eager autograd has to be told
        changed = (parameter, exp_avg, exp_avg_sq, step)
        torch.autograd.graph.increment_version(t for t in changed if not t.is_inference())
