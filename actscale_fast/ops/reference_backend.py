"""The functions of a backend in plain PyTorch, gradients by the formulas: an `interface.BackendModule`.

It serves the calls of a kernel that failed its canary, also from graphs that were compiled before, and it is what
canaries compare with. Calls that `auto` or the user gives to the reference go through `reference`, which autograd
differentiates, before they come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import outputs, reference
from .interface import LossArguments
from .losses.linear_softmax import in_chunks as linear_softmax
from .reference import accumulation_dtype, rows_of

__all__ = [
    "dynamic_scale",
    "dynamic_scale_backward",
    "intervention_loss",
    "intervention_loss_scale_",
    "linear_softmax",
    "proximal_adam_",
    "scale_channels",
    "scale_channels_backward",
    "scale_heads",
    "scale_heads_backward",
]


def scale_heads(
    x: Tensor, alpha: Tensor | None, shift: Tensor | None, strength: float, row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:  # fmt: skip
    return outputs.like(x).copy_(reference.scale_heads(x, alpha, shift, strength, row_strength, group))


def scale_heads_backward(
    dy: Tensor, x: Tensor, alpha: Tensor | None, shift: Tensor | None, strength: float, row_strength: Tensor | None,
    group: Tensor | None, need_dx: bool, need_dalpha: bool, need_dshift: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dalpha, dshift = outputs.scale_heads_gradients(x, alpha, shift, need_dx, need_dalpha, need_dshift)
    beta, wide = _beta(strength, row_strength, dy), dy.to(accumulation_dtype(dy.dtype))
    if need_dx:
        factor = 1.0 if alpha is None else (1 + beta * rows_of(alpha.to(wide.dtype), group))[..., None]
        dx.copy_(wide * factor)
    if need_dalpha and alpha is not None:
        _sum_into(dalpha, beta * (wide * x).sum(-1), group)
    if need_dshift and shift is not None:
        _sum_into(dshift, beta[..., None] * wide, group)
    return dx, dalpha, dshift


def dynamic_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, strength: float, row_strength: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, scalars = outputs.dynamic_scale(x)
    results = reference.dynamic_scale(x, weight, bias, strength, row_strength, group)
    return y.copy_(results[0]), scalars.copy_(results[1])


def dynamic_scale_backward(
    dy: Tensor, d_scalars: Tensor | None, x: Tensor, weight: Tensor, scalars: Tensor, strength: float,
    row_strength: Tensor | None, group: Tensor | None, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dbias = outputs.dynamic_scale_gradients(x, weight, need_dx, need_dweight, need_dbias)
    beta, wide = _beta(strength, row_strength, dy), dy.to(accumulation_dtype(dy.dtype))
    upstream = beta * (wide * x).sum(-1)  # [B, T, H]
    upstream = upstream if d_scalars is None else upstream + d_scalars
    if need_dx:
        of_probe = upstream[..., None] * rows_of(weight.to(wide.dtype), group)[:, None]
        dx.copy_(wide * (1 + beta * scalars)[..., None] + of_probe)
    if need_dweight:
        _sum_into(dweight[:, None], upstream[..., None] * x, group)
    if need_dbias:
        _sum_into(dbias[:, None], upstream, group)
    return dx, dweight, dbias


def scale_channels(x: Tensor, weight: Tensor) -> Tensor:
    return reference.scale_channels(x, weight).contiguous()


def scale_channels_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = outputs.scale_channels_gradients(x, weight, need_dx, need_dweight)
    if need_dx:
        dx.copy_(reference.scale_channels(dy, weight))
    if need_dweight:
        dweight.copy_((dy.to(torch.float32) * x).reshape(-1, len(weight)).sum(0))
    return dx, dweight


def intervention_loss(*arguments: Any, in_place: bool = False) -> tuple[Tensor, ...]:
    call = LossArguments(*arguments)
    results = outputs.intervention_loss(
        call.logits, call.scalars, call.need_grad, call.logits if call.need_grad and in_place else None
    )
    effectiveness, faithfulness, grad, answer_grad, l1, sign = results
    if call.need_grad:
        gradients = _loss_gradients(call)  # before `grad` overwrites the logits
    losses = reference.intervention_loss(
        call.logits, call.reference_logits, call.correct, call.wrong, call.direction, margin=call.margin,
        inverse_temperature=call.inverse_temperature, exclude_answers=call.exclude_answers, reverse=call.reverse,
        row_weight=call.row_weight, softcap=call.softcap,
    )  # fmt: skip
    effectiveness.copy_(losses[0])
    faithfulness.copy_(losses[1])
    if call.scalars is not None:
        l1.copy_(reference.l1_norm(call.scalars))
    if call.need_grad:
        grad.copy_(gradients[0])
        answer_grad.copy_(gradients[1])
        if call.scalars is not None:
            sign.copy_(call.scalars.sign())
    return results


def _loss_gradients(call: LossArguments) -> tuple[Tensor, Tensor]:
    """d(effectiveness + faithfulness)/dlogits [N, V] and `answer_grad` [N, 3], in the dtype of the sums."""
    z, r = (side.to(accumulation_dtype(side.dtype)) for side in (call.logits, call.reference_logits))
    if call.row_weight is not None:
        counted = (call.row_weight != 0)[:, None]
        z, r = (torch.where(counted, side, 0.0) for side in (z, r))
    slope: Tensor | float = 1.0
    if call.softcap is not None:
        z, r = (call.softcap * torch.tanh(side / call.softcap) for side in (z, r))
        slope = 1 - (z / call.softcap) ** 2
    if call.correct is None or call.wrong is None or call.direction is None:
        gradient = slope * reference.kl_gradient(z, r, call.reverse, call.inverse_temperature)
        gradient = gradient if call.row_weight is None else gradient * call.row_weight[:, None]
        return gradient, gradient.new_zeros(len(z), 3)
    answers = torch.stack([call.correct, call.wrong], -1)
    known = ((answers >= 0) & (answers < z.shape[1])).all(-1, keepdim=True)
    valid, answers = torch.where(known, 1.0, torch.nan), answers.clamp(0, z.shape[1] - 1)
    of_answers = z.gather(1, answers)
    difference = of_answers[:, :1] - of_answers[:, 1:]
    hinge = -call.direction[:, None] * (call.margin - call.direction[:, None] * difference > 0) * valid  # at c; −: at w
    if call.exclude_answers:
        z, r = (reference.without_columns(side, answers) for side in (z, r))
    if call.exclude_answers and z.shape[1] <= 2:
        gradient = torch.zeros_like(z) * valid
    else:
        gradient = valid * reference.kl_gradient(z, r, call.reverse, call.inverse_temperature)
    if call.gradient_weight is not None:
        hinge, gradient = call.gradient_weight[:, :1] * hinge, call.gradient_weight[:, 1:] * gradient
    answer_grad = torch.cat([gradient.gather(1, answers), hinge], 1)
    return gradient.scatter_add(1, answers, torch.cat([hinge, -hinge], 1)), answer_grad


def intervention_loss_scale_(
    grad: Tensor, d_effectiveness: Tensor, d_faithfulness: Tensor, correct: Tensor | None, wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:  # fmt: skip
    grad.copy_(grad.to(torch.float32) * d_faithfulness[:, None])
    if correct is None or wrong is None:
        return
    columns = torch.stack([correct, wrong], -1)
    known = ((columns >= 0) & (columns < grad.shape[1])).all(-1, keepdim=True)
    columns = columns.clamp(0, grad.shape[1] - 1)
    hinge = d_effectiveness * answer_grad[:, 2]
    values = torch.stack([d_faithfulness * answer_grad[:, 0] + hinge, d_faithfulness * answer_grad[:, 1] - hinge], -1)
    grad.scatter_(1, columns, torch.where(known, values.to(grad.dtype), grad.gather(1, columns)))


def proximal_adam_(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: float, beta1: float,
    beta2: float, eps: float, l1: float,
) -> None:  # fmt: skip
    state = (parameter, gradient, exp_avg, exp_avg_sq, step)
    reference.proximal_adam_(*state, lr=lr, beta1=beta1, beta2=beta2, eps=eps, l1=l1)


def _beta(strength: float, row_strength: Tensor | None, like: Tensor) -> Tensor:
    """β [B or 1, 1, 1]."""
    if row_strength is None:
        return like.new_full((1, 1, 1), strength, dtype=accumulation_dtype(like.dtype))
    return (strength * row_strength)[:, None, None]


def _sum_into(total: Tensor, terms: Tensor, group: Tensor | None) -> None:
    """total [G, P, ...] = the sums of terms [B, T, ...] over the rows of each group, and over T where P is 1."""
    if total.shape[1] == 1:
        terms = terms.sum(1, keepdim=True)
    if group is None:
        total.copy_(terms.sum(0, keepdim=True))
        return
    member = group == torch.arange(len(total), device=group.device)[:, None]  # [G, B]
    for index in range(len(total)):
        total[index] = (terms * member[index].view(-1, *[1] * (terms.dim() - 1))).sum(0)
