"""The losses from logits in CUDA (csrc/cuda/intervention_loss*.cu): one launch per direction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import calls, outputs
from ..interface import LossArguments
from . import launch


def intervention_loss(*arguments: Any, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, grad, answer_grad, l1, sign); see `interface.BackendModule`."""
    call = LossArguments(*arguments)
    logits = call.logits
    results = outputs.intervention_loss(logits, call.scalars, call.need_grad, logits.detach() if in_place else None)
    with launch.on_device_of(logits):
        launch.kernels.intervention_loss(**calls.intervention_loss(call, results), stream=launch.stream_of(logits))
    return results


def intervention_loss_scale_(
    grad: Tensor,
    d_effectiveness: Tensor,
    d_faithfulness: Tensor,
    correct: Tensor | None,
    wrong: Tensor | None,
    answer_grad: Tensor,
) -> None:
    """Scales each row of `grad` in place; see `interface.BackendModule`."""
    rows, vocab = grad.shape
    with launch.on_device_of(grad):
        launch.kernels.intervention_loss_scale_(
            type=calls.TYPES[grad.dtype], rows=rows, vocab=vocab, grad=grad, d_effectiveness=d_effectiveness,
            d_effectiveness_stride=d_effectiveness.stride(0), d_faithfulness=d_faithfulness,
            d_faithfulness_stride=d_faithfulness.stride(0), correct=correct, wrong=wrong, answer_grad=answer_grad,
            stream=launch.stream_of(grad),
        )  # fmt: skip
