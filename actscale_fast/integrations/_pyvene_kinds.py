"""The pyvene interventions that this package understands: its own multiplicative class, and pyvene's of one line."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from torch import Tensor, nn

from ..ops import scale_heads


class ScaleIntervention(pyvene.SourcelessIntervention, pyvene.TrainableIntervention):
    """h·(1 + α), trainable: one α a head at units "h" and "h.pos", one in all at others; 0 is the identity.

    pyvene makes it from a config, saves and loads it. With unit "h" `max_number_of_units` is the number of heads that a
    call names in `unit_locations` (all of them, in order, for `unit_locations=None`), and α belongs to them in that
    order.

    Example:
        >>> config = [{"layer": 3, "component": "head_attention_value_output", "unit": "h", "max_number_of_units": 2,
        ...            "intervention_type": ScaleIntervention}]
        >>> heads = {"base": [[[0, 5]] * n_rows]}  # one list an intervention, in it one a row
        >>> _, steered = pyvene.IntervenableModel(config, model)(base=inputs, unit_locations=heads)
    """

    def __init__(self, **kwargs: Any) -> None:
        # No embed_dim: what is saved is α alone, whatever pyvene knows of the component's width.
        super().__init__(**{**kwargs, "keep_last_dim": True, "embed_dim": None})
        by_head = str(kwargs.get("unit") or "pos").startswith("h")
        self.alpha = nn.Parameter(torch.zeros(int(kwargs.get("max_number_of_units") or 1) if by_head else 1))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """base [B, n, T, D] of n heads, [B, T, d], or [N, d] where the model flattens tokens; the same shape back."""
        alpha = self.alpha[None, None]
        if base.dim() == 4:
            return scale_heads(base.transpose(1, 2), alpha).transpose(1, 2)
        heads = base.unflatten(-1, (self.alpha.numel(), -1))
        return scale_heads(heads.reshape(-1, *heads.shape[-3:]), alpha).reshape(base.shape)

    def __str__(self) -> str:
        return f"ScaleIntervention({self.alpha.numel()})"


# What a saved config calls it, and where pyvene looks for it when it loads one.
ScaleIntervention.__module__ = "actscale_fast.integrations.pyvene"

#: pyvene's interventions that add a constant vector, and with which sign.
SIGNS = {pyvene.AdditionIntervention: 1.0, pyvene.SubtractionIntervention: -1.0}
KINDS = (ScaleIntervention, pyvene.ZeroIntervention, *SIGNS)


def unknown_kind(kind: type) -> str:
    """Why a class is not understood; empty where it is."""
    return "" if kind in KINDS else f"{kind.__name__} is not one of {', '.join(known.__name__ for known in KINDS)}"


def added_vector(kind: type, source: Tensor, n_dims: int | None) -> Tensor:
    """What an addition or subtraction adds: ± its source [D], 0 beyond the first `n_dims` dimensions."""
    vector = SIGNS[kind] * source.reshape(-1).float()
    if n_dims is None or n_dims >= len(vector):
        return vector
    return torch.cat([vector[:n_dims], vector.new_zeros(len(vector) - n_dims)])
