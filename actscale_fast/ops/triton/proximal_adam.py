"""One Adam step on all scalars and the proximal step of λ‖·‖₁ in Adam's own metric (`reference.proximal_adam_`).

    m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²        ρ = lr/(√(v/(1−β₂ᵗ)) + ε)        (arXiv 1412.6980, alg. 1)
    u = α − ρ·m/(1−β₁ᵗ)      α ← sign(u)·max(|u| − ρ·λ, 0)
Nothing is saved. Bytes per scalar: 28 (α, m, v read and written, g read). For thousands of scalars that is a launch and
nothing else, so it is one launch: one program walks over all of them, reads `step` first and writes it last. Beyond
`ONE_PROGRAM` scalars that program would be slower than the chip; then `step` is incremented by an op of its own, and
many programs read it.

1 − βᵗ loses its digits in float32 for β near 1 and small t, so it is −expm1(t·log β), by its series near 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device import OPTIONS, ceil_div, on_device_of

BLOCK = 1024
#: Not measured on a GPU yet: 16 blocks of 1024 scalars in a row cost about what one more launch does.
ONE_PROGRAM = 16 * BLOCK


@triton.jit
def _one_minus_exp(x):
    """1 − eˣ for x ≤ 0, accurate near 0."""
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0)
    series = 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series)))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["n", "blocks"])
def proximal_adam_kernel(
    p_parameter,  # [n]
    p_gradient,
    p_exp_avg,
    p_exp_avg_sq,
    p_step,  # []
    n,
    blocks,  # a program
    lr,
    beta1,
    beta2,
    rest1,  # 1 − β, rounded once
    rest2,
    log_beta1,
    log_beta2,
    eps,
    l1,
    COUNTS: tl.constexpr,  # the only program: `step` is its to increment
    BLOCK: tl.constexpr,
):
    step = tl.load(p_step)
    if COUNTS:
        step += 1.0
    correction1 = _one_minus_exp(step * log_beta1)
    correction2 = _one_minus_exp(step * log_beta2)
    for block in range(blocks):
        i = (tl.program_id(0).to(tl.int64) * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        here = i < n
        b_g = tl.load(p_gradient + i, mask=here, other=0.0)
        b_m = beta1 * tl.load(p_exp_avg + i, mask=here, other=0.0) + rest1 * b_g
        b_v = beta2 * tl.load(p_exp_avg_sq + i, mask=here, other=0.0) + rest2 * b_g * b_g
        b_rate = lr / (tl.sqrt(b_v / correction2) + eps)
        b_moved = tl.load(p_parameter + i, mask=here, other=0.0) - b_rate * (b_m / correction1)
        b_left = tl.abs(b_moved) - b_rate * l1
        b_left = tl.where(b_left <= 0.0, 0.0, tl.where(b_moved < 0.0, -b_left, b_left))  # a NaN stays one
        tl.store(p_exp_avg + i, b_m, mask=here)
        tl.store(p_exp_avg_sq + i, b_v, mask=here)
        tl.store(p_parameter + i, b_left, mask=here)
    if COUNTS:
        tl.debug_barrier()  # every thread has read the step
        tl.store(p_step, step)


def proximal_adam_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l1: float,
) -> None:
    """One step in place; see `reference.proximal_adam_`."""
    n = parameter.numel()
    one_program = n <= ONE_PROGRAM
    blocks = ceil_div(n, BLOCK)
    if not one_program:
        step.add_(1)
    with on_device_of(parameter):
        proximal_adam_kernel[(1 if one_program else blocks,)](
            parameter, gradient, exp_avg, exp_avg_sq, step, n, blocks if one_program else 1,
            lr, beta1, beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps, l1,
            COUNTS=one_program, BLOCK=BLOCK, num_warps=4, **OPTIONS,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
