"""The C++ kernels as a backend: tensors become addresses, sizes and strides; outputs are allocated here.

Each call runs on `torch.get_num_threads()` of torch's own OpenMP threads (torch is loaded first, so the extension's
calls resolve to its runtime); the sums do not depend on how many. The instructions (AVX-512, AVX2 or portable) are
chosen by what the processor has; environment variable ACTSCALE_CPU_LEVEL forces a lower level.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from actscale_fast import _C

from . import layout

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Bytes of a gradient that is worth keeping for the next one, and of one too large to hold on to.
KEPT_FROM, KEPT_UP_TO = 1 << 20, 64 << 20

if "ACTSCALE_CPU_LEVEL" in os.environ:
    _C.set_level(os.environ["ACTSCALE_CPU_LEVEL"])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _groups(alpha: Tensor | None, shift: Tensor | None) -> tuple[int, int, int]:
    """(G, P of α, P of v); P of one that is absent is 1."""
    present = alpha if alpha is not None else shift
    assert present is not None, "the public function asks for one of the two"
    return present.shape[0], 1 if alpha is None else alpha.shape[1], 1 if shift is None else shift.shape[1]


def scale_heads(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    layout.require_unit_stride(x)
    y = layout.empty_like(x)
    _C.scale_heads(
        _TYPES[x.dtype], tuple(x.shape), x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3],
        _address(alpha), _address(shift), _groups(alpha, shift), strength, _address(row_strength), _address(group),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def scale_heads_backward(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
    need_dx: bool,
    need_dalpha: bool,
    need_dshift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if need_dalpha:
        layout.require_unit_stride(x)
    dy = dy.to(x.dtype)
    dx = layout.empty_like(x) if need_dx else x.new_empty(0)
    dalpha = torch.empty_like(alpha) if need_dalpha and alpha is not None else x.new_empty(0, dtype=torch.float32)
    dshift = torch.empty_like(shift) if need_dshift and shift is not None else x.new_empty(0, dtype=torch.float32)
    _C.scale_heads_backward(
        _TYPES[x.dtype], tuple(x.shape), dy.data_ptr(), dy.stride(), x.data_ptr(), x.stride()[:3],
        dx.data_ptr() if need_dx else 0, dx.stride()[:3], _address(alpha), _address(shift), _groups(alpha, shift),
        strength, _address(row_strength), _address(group), dalpha.data_ptr() if need_dalpha else 0,
        dshift.data_ptr() if need_dshift else 0, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalpha, dshift


def _gradient_like(logits: Tensor) -> Tensor:
    """An uninitialised tensor of the logits' shape; a large one lies in a kept block (csrc/kept_memory.h)."""
    n_bytes = logits.numel() * logits.element_size()
    if not KEPT_FROM <= n_bytes <= KEPT_UP_TO:
        return logits.new_empty(logits.shape)
    flat = torch.frombuffer(_C.KeptMemory(n_bytes), dtype=logits.dtype, count=logits.numel())
    return flat.resize_(logits.shape)  # not view(): a gradient that is a view would be copied when it is accumulated


def intervention_loss(
    logits: Tensor,
    reference_logits: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    direction: Tensor | None,
    scalars: Tensor | None,
    margin: float,
    inverse_temperature: float,
    exclude_answers: bool,
    reverse: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows, vocab = logits.shape
    effectiveness = logits.new_empty(n_rows, dtype=torch.float32)
    faithfulness = torch.empty_like(effectiveness)
    grad = _gradient_like(logits) if need_grad else logits.new_empty(0)
    answer_grad = effectiveness.new_empty((n_rows, 3) if need_grad else (0,))
    _C.intervention_loss(
        _TYPES[logits.dtype], n_rows, vocab, logits.data_ptr(), logits.stride(0), reference_logits.data_ptr(),
        reference_logits.stride(0), _address(correct), _address(wrong), _address(direction), margin,
        inverse_temperature, exclude_answers, reverse, effectiveness.data_ptr(), faithfulness.data_ptr(),
        grad.data_ptr() if need_grad else 0, answer_grad.data_ptr() if need_grad else 0, torch.get_num_threads(),
    )  # fmt: skip
    l1 = effectiveness.new_empty(() if scalars is not None else (0,))
    sign = torch.empty_like(scalars) if scalars is not None and need_grad else effectiveness.new_empty(0)
    if scalars is not None:
        _C.l1_norm(scalars.data_ptr(), sign.data_ptr() if need_grad else 0, l1.data_ptr(), scalars.numel())
    return effectiveness, faithfulness, grad, answer_grad, l1, sign


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    _C.scale_gradient(
        _TYPES[grad.dtype], *grad.shape, grad.data_ptr(), d_effectiveness.data_ptr(), d_effectiveness.stride(0),
        d_faithfulness.data_ptr(), d_faithfulness.stride(0), _address(correct), _address(wrong), answer_grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


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
    _C.proximal_adam(
        parameter.numel(), parameter.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        step.data_ptr(), lr, beta1, beta2, eps, l1,
    )  # fmt: skip
