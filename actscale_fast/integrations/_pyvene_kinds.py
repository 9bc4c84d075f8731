"""The pyvene interventions that are supported: this package's `ScaleIntervention`, zeroing, and addition."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from torch import Tensor, nn

from ..ops import scale_heads

#: A number of dimensions that no activation has.
ALL_DIMS = torch.iinfo(torch.int32).max


class ScaleIntervention(pyvene.SourcelessIntervention, pyvene.TrainableIntervention):
    """h·(1 + α), trainable: one α per head at units "h" and "h.pos", otherwise a single one; 0 is the identity.

    pyvene creates it from a config, saves it and loads it. With unit "h", `max_number_of_units` is the number of heads
    that a call names in `unit_locations` (all, in order, for `unit_locations=None`); α belongs to them in that order.

    `forward` raises a ValueError if a call names subspaces, if `set_interchange_dim` has limited the dimensions, or if
    the number of heads differs from the number of factors.

    Example:
        >>> config = [{"layer": 3, "component": "head_attention_value_output", "unit": "h", "max_number_of_units": 2,
        ...            "intervention_type": ScaleIntervention}]
        >>> heads = {"base": [[[0, 5]] * n_rows]}  # one list per intervention, with one list per row
        >>> _, steered = pyvene.IntervenableModel(config, model)(base=inputs, unit_locations=heads)
    """

    def __init__(self, **kwargs: Any) -> None:
        # No embed_dim, so that only α is saved.
        super().__init__(**{**kwargs, "keep_last_dim": True, "embed_dim": None})
        # Set explicitly: otherwise pyvene's `load` takes the width of a head to be hidden_size // n_heads.
        self.set_interchange_dim(ALL_DIMS)
        self._by_head = str(kwargs.get("unit") or "pos").startswith("h")
        n_scalars = int(kwargs.get("max_number_of_units") or 1) if self._by_head else 1
        self.alpha = nn.Parameter(torch.zeros(n_scalars, dtype=torch.float32))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """base: [B, n, T, D] with n heads at units "h" and "h.pos"; otherwise [B, T, d], [N, d] or [..., D]."""
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


#: pyvene's interventions that add a constant vector, with the sign.
SIGNS = {pyvene.AdditionIntervention: 1.0, pyvene.SubtractionIntervention: -1.0}
KINDS = (ScaleIntervention, pyvene.ZeroIntervention, *SIGNS)


def unknown_kind(kind: type) -> str:
    """Why a class is not supported; empty if it is."""
    return "" if kind in KINDS else f"{kind.__name__} is not one of {', '.join(known.__name__ for known in KINDS)}"


def added_vector(kind: type, source: Tensor, n_dims: int | None) -> Tensor:
    """The vector that an addition or subtraction adds: ± its source [D], with 0 beyond the first `n_dims`."""
    vector = SIGNS[kind] * source.reshape(-1).to(torch.promote_types(source.dtype, torch.float32))
    if n_dims is None or n_dims >= len(vector):
        return vector
    return torch.cat([vector[:n_dims], vector.new_zeros(len(vector) - n_dims)])
