"""The tensors that the ops return, uninitialised: one rule for every backend and for traces.

An output that is not asked for is an empty tensor, so that the number of outputs never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def like(x: Tensor) -> Tensor:
    """Laid out as `torch.empty_like(x)` where that has unit stride over the last axis, else contiguous.

    PyTorch sorts the axes of an x that overlaps itself (`base.unfold`) by its strides, and ties may put D outside.
    """
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _float32(x: Tensor, like: Tensor | None, needed: bool) -> Tensor:
    return torch.empty_like(like) if needed and like is not None else x.new_empty(0, dtype=torch.float32)


def scale_heads_gradients(
    x: Tensor, alpha: Tensor | None, shift: Tensor | None, need_dx: bool, need_dalpha: bool, need_dshift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dalpha, dshift)."""
    dx = like(x) if need_dx else x.new_empty(0)
    return dx, _float32(x, alpha, need_dalpha), _float32(x, shift, need_dshift)


def dynamic_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, α [B, T, H] float32)."""
    return like(x), x.new_empty(x.shape[:3], dtype=torch.float32)


def dynamic_scale_gradients(
    x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight [G, H, D], dbias [G, H])."""
    dx = like(x) if need_dx else x.new_empty(0)
    return dx, _float32(x, weight, need_dweight), weight.new_empty(weight.shape[:2] if need_dbias else (0,))


def scale_channels_gradients(x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    return x.new_empty(x.shape if need_dx else 0), _float32(x, weight, need_dweight)


def intervention_loss(
    logits: Tensor, scalars: Tensor | None, need_grad: bool, grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, grad, answer_grad, l1, sign); `grad`: memory for the gradient, where there is some.

    See `interface.BackendModule.intervention_loss`.
    """
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return (
        rows,
        torch.empty_like(rows),
        grad if grad is not None else logits.new_empty(logits.shape if need_grad else (0,)),
        rows.new_empty((logits.shape[0], 3) if need_grad else (0,)),
        rows.new_empty(() if scalars is not None else (0,)),
        _float32(logits, scalars, need_grad),
    )


def linear_softmax(hidden: Tensor, correct: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_sum [N] float64, mean [N, d] float32, mean_bias [N] float64, answers [N, 2] float32)."""
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    answers = hidden.new_empty((hidden.shape[0] if correct is not None else 0, 2), dtype=torch.float32)
    return rows, hidden.new_empty(hidden.shape, dtype=torch.float32), torch.empty_like(rows), answers
