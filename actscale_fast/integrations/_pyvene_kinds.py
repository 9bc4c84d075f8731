"""The pyvene interventions that this package understands: its own multiplicative class, and pyvene's of one line."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from torch import Tensor, nn

from ..ops import scale_heads

#: A number of dimensions that no activation has.
ALL_DIMS = torch.iinfo(torch.int32).max


class ScaleIntervention(pyvene.SourcelessIntervention, pyvene.TrainableIntervention):
    """h·(1 + α), trainable: one α a head at units "h" and "h.pos", one in all at others; 0 is the identity.

    pyvene makes it from a config, saves and loads it. With unit "h" `max_number_of_units` is the number of heads that a
    call names in `unit_locations` (all of them, in order, for `unit_locations=None`), and α belongs to them in that
    order.

    `forward` raises ValueError where a call names subspaces, `set_interchange_dim` has limited the dimensions, or other
    heads come than there are factors: it multiplies whole heads.

    Example:
        >>> config = [{"layer": 3, "component": "head_attention_value_output", "unit": "h", "max_number_of_units": 2,
        ...            "intervention_type": ScaleIntervention}]
        >>> heads = {"base": [[[0, 5]] * n_rows]}  # one list an intervention, in it one a row
        >>> _, steered = pyvene.IntervenableModel(config, model)(base=inputs, unit_locations=heads)
    """

    def __init__(self, **kwargs: Any) -> None:
        # No embed_dim: what is saved is α alone, whatever pyvene knows of the component's width.
        super().__init__(**{**kwargs, "keep_last_dim": True, "embed_dim": None})
        # Said, not left open: where it is, pyvene's `load` takes the width of a head from hidden_size // n_heads.
        self.set_interchange_dim(ALL_DIMS)
        self._by_head = str(kwargs.get("unit") or "pos").startswith("h")
        n_scalars = int(kwargs.get("max_number_of_units") or 1) if self._by_head else 1
        self.alpha = nn.Parameter(torch.zeros(n_scalars, dtype=torch.float32))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """base [B, n, T, D] of n heads at units "h" and "h.pos"; [B, T, d], [N, d] or [..., D]. The same shape back."""
        if subspaces is not None:
            raise ValueError(f"subspaces: got {subspaces}, expected None: ScaleIntervention multiplies whole heads")
        alpha, count = self.alpha[None, None], self.alpha.numel()
        if self._by_head and base.dim() == 4:
            if base.shape[1] != count:
                raise ValueError(f"base: got shape {tuple(base.shape)}, expected (B, {count}, T, D), split by heads")
            self._check_dims(base.shape[-1])
            return scale_heads(base.transpose(1, 2), alpha).transpose(1, 2)
        heads = base.unflatten(-1, (count, -1))
        self._check_dims(heads.shape[-1])
        return scale_heads(heads.reshape(-1, *heads.shape[-3:]), alpha).reshape(base.shape)

    def _check_dims(self, width: int) -> None:
        if self.interchange_dim is not None and int(self.interchange_dim) < width:
            raise ValueError(
                f"interchange_dim: got {int(self.interchange_dim)}, expected {width} or more: ScaleIntervention "
                "multiplies whole heads"
            )

    def __str__(self) -> str:
        return f"ScaleIntervention({self.alpha.numel()})"


#: pyvene's interventions that add a constant vector, and with which sign.
SIGNS = {pyvene.AdditionIntervention: 1.0, pyvene.SubtractionIntervention: -1.0}
KINDS = (ScaleIntervention, pyvene.ZeroIntervention, *SIGNS)


def unknown_kind(kind: type) -> str:
    """Why a class is not understood; empty where it is."""
    return "" if kind in KINDS else f"{kind.__name__} is not one of {', '.join(known.__name__ for known in KINDS)}"


def added_vector(kind: type, source: Tensor, n_dims: int | None) -> Tensor:
    """What an addition or subtraction adds: ± its source [D], float32 or float64, 0 beyond the first `n_dims`."""
    vector = SIGNS[kind] * source.reshape(-1).to(torch.promote_types(source.dtype, torch.float32))
    if n_dims is None or n_dims >= len(vector):
        return vector
    return torch.cat([vector[:n_dims], vector.new_zeros(len(vector) - n_dims)])
