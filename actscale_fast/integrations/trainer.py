"""The ℓ1 norm's proximal step inside transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..patching.pretrained import ActScaleModel


class ProximalCallback(TrainerCallback):
    """After each step of the optimizer, the soft threshold of λ‖·‖₁ on the intervention of an `ActScaleModel`.

    In Adam's metric (Adam, AdamW and what keeps their state: `exp_avg_sq`) the threshold is lr·λ/(√v̂ + ε), as in
    `ops.proximal_adam_`; for any other optimizer it is that of gradient descent, lr·λ. Entries become exactly 0. Weight
    decay is the optimizer's: set it to 0 unless a quadratic penalty is meant.

    Args:
        minimality: λ ≥ 0.

    Raises:
        ValueError: a negative λ.
        TypeError: when training begins, a model that is no `ActScaleModel`.
        RuntimeError: after a step of an optimizer that has none of the intervention's parameters (FSDP's flat ones).

    Example:
        >>> model = af.get_actscale_model(model)
        >>> Trainer(model=model, args=TrainingArguments(..., learning_rate=3e-2), callbacks=[ProximalCallback(0.01)])
    """

    def __init__(self, minimality: float) -> None:
        if not minimality >= 0:
            raise ValueError(f"minimality: got {minimality}, expected a number from 0 on")
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
        if getattr(optimizer, "step_was_skipped", False):  # a scaled fp16 gradient that overflowed
            return
        rates = list(_rates(getattr(optimizer, "optimizer", optimizer), kwargs["model"].intervention))
        if not rates:
            raise RuntimeError(
                "optimizer: steps none of the intervention's parameters, expected them in its groups as they are"
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
            steps = torch.as_tensor(found["step"]).double()  # 1 − βᵗ in float32 loses digits; on a GPU nothing waits
            corrected = second / (1 - group["betas"][1] ** steps)
            yield parameter, group["lr"] / (corrected.sqrt() + group["eps"])
