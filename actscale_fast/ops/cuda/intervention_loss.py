"""The losses from logits in CUDA (csrc/cuda/intervention_loss*.cu): one launch per direction."""

from __future__ import annotations

from torch import Tensor

from .. import outputs
from ..calls import TYPES
from . import launch


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
    row_weight: Tensor | None = None,
    softcap: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, grad, answer_grad, l1, sign); see `interface.BackendModule`."""
    results = outputs.intervention_loss(logits, scalars, need_grad, logits.detach() if in_place else None)
    effectiveness, faithfulness, grad, answer_grad, l1, sign = results
    rows, vocab = logits.shape
    with launch.on_device_of(logits):
        launch.kernels.intervention_loss(
            type=TYPES[logits.dtype], rows=rows, vocab=vocab, logits=logits, logits_stride=logits.stride(0),
            reference=reference_logits, reference_stride=reference_logits.stride(0), correct=correct, wrong=wrong,
            direction=direction, row_weight=row_weight, margin=margin, inverse_temperature=inverse_temperature,
            softcap=softcap, exclude_answers=exclude_answers, reverse=reverse, effectiveness=effectiveness,
            faithfulness=faithfulness, grad=grad, answer_grad=answer_grad, scalars=scalars,
            n_scalars=None if scalars is None else scalars.numel(), l1=l1, sign=sign, stream=launch.stream_of(logits),
        )  # fmt: skip
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
            type=TYPES[grad.dtype], rows=rows, vocab=vocab, grad=grad, d_effectiveness=d_effectiveness,
            d_effectiveness_stride=d_effectiveness.stride(0), d_faithfulness=d_faithfulness,
            d_faithfulness_stride=d_faithfulness.stride(0), correct=correct, wrong=wrong, answer_grad=answer_grad,
            stream=launch.stream_of(grad),
        )  # fmt: skip
