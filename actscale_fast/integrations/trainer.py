"""The proximal step of the ℓ1 norm in transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..patching.pretrained import ActScaleModel


class ProximalCallback(TrainerCallback):
    """Applies the soft threshold of λ‖·‖₁ to the intervention of an `ActScaleModel` after each optimizer step.

    With optimizers that keep Adam's state (`exp_avg_sq`) the threshold is lr·λ/(√v̂ + ε), as in `ops.proximal_adam_`;
    with others it is lr·λ, as in gradient descent. Entries become exactly 0. Set the optimizer's weight decay to 0
    unless you want a quadratic penalty as well.

    Args:
        minimality: λ ≥ 0.

    Raises:
        ValueError: a negative λ.
        TypeError: when training begins, if the model is not an `ActScaleModel`.
        RuntimeError: after a step, if the optimizer has none of the intervention's parameters (FSDP flattens them).

    Example:
        >>> model = af.get_actscale_model(model)
        >>> Trainer(model=model, args=TrainingArguments(..., learning_rate=3e-2), callbacks=[ProximalCallback(0.01)])
    """

    def __init__(self, minimality: float) -> None:
        if not minimality >= 0:
            raise ValueError(f"minimality: got {minimality}, expected a number that is at least 0")
        self.minimality = minimality

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not isinstance(kwargs["model"], ActScaleModel):
            raise TypeError(f"model: got {type(kwargs['model']).__name__}, expected the result of get_actscale_model")

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):  # a scaled float16 gradient overflowed
            return
        rates = list(_rates(getattr(optimizer, "optimizer", optimizer), kwargs["model"].intervention))
        if not rates:
            raise RuntimeError(
                "optimizer: has none of the intervention's parameters, expected them unchanged in its groups"
            )
        for parameter, rate in rates:
            parameter.copy_(parameter.sign() * (parameter.abs() - self.minimality * rate).clamp_(min=0))


def _rates(optimizer: torch.optim.Optimizer, intervention: nn.Module) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Each learned parameter of the intervention with the step size of its entries."""
    own = {id(parameter) for parameter in intervention.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                continue
            found = optimizer.state.get(parameter, {})
            second = found.get("max_exp_avg_sq", found.get("exp_avg_sq"))
            if second is None or second.shape != parameter.shape:
                yield parameter, group["lr"]
                continue
            steps = torch.as_tensor(found["step"]).double()  # in float32, 1 − βᵗ loses digits
            corrected = second / (1 - group["betas"][1] ** steps)
            yield parameter, group["lr"] / (corrected.sqrt() + group["eps"])
