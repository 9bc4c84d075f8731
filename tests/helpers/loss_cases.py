"""What the tests of the losses share: the op under a given upstream, and its check against the textbook's float64."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Backend, Inputs, Losses, Rows, assert_as_exact_as_eager, textbook_losses
from torch import Tensor

from actscale_fast import ops


def fused(rows: Rows, upstream: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, gradient of the logits) of intervention_loss under the given upstream."""
    logits = rows.logits.detach().requires_grad_()
    e, f = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, **options)
    (gradient,) = torch.autograd.grad((e, f), logits, upstream)
    return e.detach(), f.detach(), gradient


def assert_gradient(
    gradient: Tensor, exact: Losses, eager: Losses, upstream: tuple[Tensor, Tensor], backend: Backend
) -> None:
    assert_as_exact_as_eager(
        "gradient", gradient, exact.gradient, eager.gradient,
        condition=backend.exp_error * exact.gradient_condition, scaled_by=upstream[1][:, None],
        truncated=backend.truncates(gradient.dtype),
    )  # fmt: skip


def check(backend: Backend, rows: Rows, upstream: tuple[Tensor, Tensor], **options: Any) -> None:
    """Values and gradients against float64, within twice the error of eager float32."""
    e, f, gradient = fused(rows, upstream, **options)
    exact = textbook_losses(rows, upstream, torch.float64, **options)
    eager = textbook_losses(rows, upstream, torch.float32, **options)
    assert (e.dtype, f.dtype, gradient.dtype) == (torch.float32, torch.float32, rows.logits.dtype)
    assert_as_exact_as_eager("effectiveness", e, exact.effectiveness, eager.effectiveness)
    condition = backend.exp_error * exact.value_condition
    assert_as_exact_as_eager("faithfulness", f, exact.faithfulness, eager.faithfulness, condition=condition)
    assert_gradient(gradient, exact, eager, upstream, backend)


def upstreams(inputs: Inputs, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return inputs.normal(n_rows).to(device), inputs.normal(n_rows).to(device)
