"""Every formula of the package in plain PyTorch: the specification that the kernels are tested against.

Sums are carried in float32 (float64 for float64 inputs) and the result is rounded once to the input's dtype.
Everything here is differentiable by autograd any number of times, so `gradcheck` in float64 applies.
Inputs are taken as valid: the public functions check them first. Only ids, which are not read on a GPU, may be out of
range: their rows become NaN, and nothing is read out of bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_internals import in_forward_mode


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_heads(
    x: Tensor,  # [B, T, H, D]
    alpha: Tensor | None,  # [G, P, H]
    shift: Tensor | None,  # [G, P, H, D]
    strength: float,
    row_strength: Tensor | None,  # [B]
    group: Tensor | None,  # [B]
) -> Tensor:
    """y = x·(1 + β·α) + β·v with β = strength · row_strength[b] (arXiv 2410.04962, eq. 4 and 5)."""
    acc = accumulation_dtype(x.dtype)
    beta: Tensor | float = strength
    if row_strength is not None:
        beta = strength * row_strength.to(acc)[:, None, None]
    y = x.to(acc)
    if alpha is not None:
        rows = rows_of(alpha.to(acc), group)
        y = y * (1 + beta * rows)[..., None]
    if shift is not None:
        rows = rows_of(shift.to(acc), group)
        y = y + (beta[..., None] if isinstance(beta, Tensor) else beta) * rows
    return y.to(x.dtype)


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    """y = x·w: x [..., d], w [d] (arXiv 2205.05638, section 3.3)."""
    acc = accumulation_dtype(x.dtype)
    return (x.to(acc) * weight.to(acc)).to(x.dtype)


def dynamic_scale(
    x: Tensor,  # [B, T, H, D]
    weight: Tensor,  # [G, H, D]
    bias: Tensor | None,  # [G, H]
    strength: float,
    row_strength: Tensor | None,  # [B]
    group: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:
    """(y, α): α = ⟨w, x⟩ + c [B, T, H] and y = x·(1 + β·α) (arXiv 2410.04962, eq. 10)."""
    acc = accumulation_dtype(x.dtype)
    wide = x.to(acc)
    scalars = (wide * rows_of(weight.to(acc), group)[:, None]).sum(-1)
    if bias is not None:
        scalars = scalars + rows_of(bias.to(acc), group)[:, None]
    beta: Tensor | float = strength
    if row_strength is not None:
        beta = strength * row_strength.to(acc)[:, None, None]
    return (wide * (1 + beta * scalars)[..., None]).to(x.dtype), scalars


def rows_of(values: Tensor, group: Tensor | None) -> Tensor:
    """values [G, ...] of each row's group, NaN where there is no such group; all G rows where group is None."""
    if group is None:
        return values
    known = (group >= 0) & (group < len(values))
    rows = values[group.clamp(0, len(values) - 1)]
    return rows.masked_fill(~known.view(-1, *[1] * (values.dim() - 1)), torch.nan)


def without_columns(logits: Tensor, columns: Tensor) -> Tensor:
    """logits [N, V] with the columns [N, K] of each row set to −inf, so that a softmax renormalises without them."""
    return logits.scatter(-1, columns, float("-inf"))


def kl_divergence(
    logits: Tensor, reference_logits: Tensor, *, reverse: bool = False, inverse_temperature: float = 1.0
) -> Tensor:
    """KL(p ‖ q) per row, p = softmax(i·reference), q = softmax(i·logits); KL(q ‖ p) where `reverse`.

    Where the weighting distribution is 0 the term is 0, also when both are 0 (−inf on both sides); +inf only where it
    is positive and the other one is 0. Rows of width 0 give 0. The gradient of a row's KL to itself is exactly 0.
    """
    if logits.shape[-1] == 0:
        return logits.sum(-1)
    if reference_logits.requires_grad or in_forward_mode():  # which `_KLDivergence` has no formula for
        return _divergence(logits, reference_logits, reverse, inverse_temperature)
    return _KLDivergence.apply(logits, reference_logits, reverse, inverse_temperature)  # type: ignore[no-any-return]


def _log_softmax(logits: Tensor, inverse_temperature: float) -> Tensor:
    """log softmax(i·logits). The row's maximum comes off first: the least finite number times i would be −inf."""
    if inverse_temperature != 1.0:
        largest = logits.detach().amax(-1, keepdim=True)
        logits = (logits - largest.masked_fill(largest == -torch.inf, 0.0)) * inverse_temperature
    return logits.log_softmax(-1)


def _difference(logits: Tensor, reference_logits: Tensor, reverse: bool, i: float) -> tuple[Tensor, Tensor]:
    """(the weighting distribution, the logarithm of its ratio to the other one; 0 where the weight is 0)."""
    log_q, log_p = _log_softmax(logits, i), _log_softmax(reference_logits, i)
    log_weight, log_other = (log_q, log_p) if reverse else (log_p, log_q)
    weight = log_weight.exp()
    return weight, (log_weight - log_other).masked_fill(weight == 0, 0.0)


def _divergence(logits: Tensor, reference_logits: Tensor, reverse: bool, i: float) -> Tensor:
    weight, difference = _difference(logits, reference_logits, reverse, i)
    return (weight * difference).sum(-1)


def kl_gradient(logits: Tensor, reference_logits: Tensor, reverse: bool, i: float) -> Tensor:
    """The gradient of each row's divergence in the logits [N, V]: i·(q − p), in reverse i·q·(log q − log p − KL)."""
    if not reverse:
        return i * (_log_softmax(logits, i).exp() - _log_softmax(reference_logits, i).exp())
    weight, difference = _difference(logits, reference_logits, True, i)
    divergence = (weight * difference).sum(-1, keepdim=True)
    return i * (weight * (difference - divergence)).masked_fill(weight == 0, 0.0)


class _KLDivergence(torch.autograd.Function):
    """`_divergence` with its gradient by the formula, `kl_gradient`.

    Autograd's own, q·Σp − p, is not 0 for equal rows: Σp is 1 up to its rounding. The formula is made of plain PyTorch,
    so it is differentiable in turn.
    """

    @staticmethod
    def forward(ctx: Any, logits, reference_logits, reverse, i):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits, reference_logits)
        ctx.reverse, ctx.i = reverse, i
        return _divergence(logits, reference_logits, reverse, i)

    @staticmethod
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        logits, reference_logits = ctx.saved_tensors
        gradient = kl_gradient(logits, reference_logits, ctx.reverse, ctx.i)
        return upstream.unsqueeze(-1) * gradient, None, None, None


def intervention_loss(
    logits: Tensor,  # [N, V]
    reference_logits: Tensor,  # [N, V]
    correct: Tensor | None,  # [N] int64; None: no answers, the effectiveness is 0
    wrong: Tensor | None,  # [N] int64
    direction: Tensor | None,  # [N] of ±1
    *,
    margin: float = 1.0,
    inverse_temperature: float = 1.0,
    exclude_answers: bool = True,
    reverse: bool = False,
    row_weight: Tensor | None = None,  # [N]; without answers
    softcap: float | None = None,  # without answers
) -> tuple[Tensor, Tensor]:
    """(effectiveness [N], faithfulness [N]).

    effectiveness = max(0, m − s·(z[c] − z[w])), faithfulness = KL(p₀ ‖ p_s) over V∖{c, w}, both sides renormalised.
    The hinge, the direction of the KL and the exclusion are this package's reading of the paper (see README).
    A row of weight 0 counts 0 and has no gradient, whatever its logits are.
    """
    acc = accumulation_dtype(logits.dtype)
    z, r = logits.to(acc), reference_logits.to(acc)
    if row_weight is not None:
        counted = (row_weight != 0)[:, None]
        z, r = (torch.where(counted, side, 0.0) for side in (z, r))
    if softcap is not None:
        z, r = softcap * torch.tanh(z / softcap), softcap * torch.tanh(r / softcap)
    effectiveness = z.new_zeros(z.shape[0])
    valid: Tensor | None = None
    if correct is not None and wrong is not None and direction is not None:
        answers = torch.stack([correct, wrong], -1)  # [N, 2]
        width = z.shape[-1]
        known = ((answers >= 0) & (answers < width)).all(-1)
        valid = torch.where(known, 1.0, torch.nan).to(acc)  # a factor, so that the row's gradient is NaN too
        answers = answers.clamp(0, width - 1)
        z_answers = z.gather(-1, answers)
        difference = z_answers[:, 0] - z_answers[:, 1]
        effectiveness = valid * torch.relu(margin - direction.to(acc) * difference)
        if exclude_answers:
            if width <= 2:  # nothing is left of V: the KL of two empty distributions is 0
                return effectiveness, valid * (0.0 * difference)
            z, r = without_columns(z, answers), without_columns(r, answers)
    divergence = kl_divergence(z, r, reverse=reverse, inverse_temperature=inverse_temperature)
    factor = valid if row_weight is None else row_weight.to(acc)
    return effectiveness, divergence if factor is None else factor * divergence


def l1_norm(scalars: Tensor) -> Tensor:
    """‖α‖₁; its subgradient at 0 is 0."""
    return scalars.to(accumulation_dtype(scalars.dtype)).abs().sum()


def proximal_adam_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,  # float32 scalar: steps taken so far; incremented
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l1: float,
) -> None:
    """One Adam step (arXiv 1412.6980, alg. 1), then the proximal step of λ‖·‖₁ in Adam's own metric.

    Adam moves by lr·m̂/(√v̂ + ε): gradient descent in the metric diag((√v̂ + ε)/lr). The proximal operator of λ‖·‖₁ in
    that metric is the soft threshold at lr·λ/(√v̂ + ε), which sets entries to exactly 0.
    """
    step += 1
    steps = step.double()  # 1 − βᵗ in float32 loses the digits that 1 has over it: 6e-5 of it at β = 0.999, t = 1
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first = exp_avg / (1 - beta1**steps)
    rate = lr / ((exp_avg_sq / (1 - beta2**steps)).sqrt() + eps)
    moved = parameter - rate * first
    parameter.copy_(moved.sign() * (moved.abs() - rate * l1).clamp_(min=0))
