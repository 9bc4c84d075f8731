"""The lowest layers that all directions share: below the lowest scalar that is not zero, they run once per prompt.

An edit whose parameters are 0 is the identity, and its derivative is linear in the strength β. The gradient of such a
layer is therefore that of Σ_s s·(upstream gradient under β = s). If an edit breaks this, `gradient_check` notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import Intervention
from ...ops.once_differentiable import once_differentiable


def shared_below(intervention: Intervention, groups: Sequence[int], n_layers: int) -> int:
    """The layers below this one give all directions the same output; n_layers + 1: the whole model does.

    This reads the parameters, which on a GPU would wait for the previous step.

    Args:
        intervention: the intervention, single or stacked.
        groups: the groups of a stack that are in use.
        n_layers: the model's number of layers.
    """
    starts = [n_layers + 1]
    for single in intervention.singles:
        location = single.location
        steered = torch.zeros(len(location.layers), dtype=torch.bool, device="cpu")
        for value in single.parameters():  # including those that are not learned
            values = value.detach()
            values = values[None] if single.n_groups is None else values[sorted(set(groups))]
            steered |= values.flatten(2).ne(0).any(-1).any(0).cpu()
        starts += [location.first_changed(location.layers[index]) for index in steered.nonzero().flatten().tolist()]
    return min(starts)


class SignedRows(torch.autograd.Function):
    """Rows under several directions from shared ones: row r is x[expand[r]]; x[i] gets Σ_r sign[r]·dy[r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: Tensor, sign: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(expand, sign)
        ctx.n_rows = x.shape[0]
        return x[expand]

    @staticmethod
    @once_differentiable("the layers that all directions share")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        expand, sign = ctx.saved_tensors
        signed = dy * sign.to(dy.dtype).view(-1, *[1] * (dy.dim() - 1))
        return dy.new_zeros(ctx.n_rows, *dy.shape[1:]).index_add_(0, expand, signed), None, None
