"""Steering vectors: h + β·v (arXiv 2410.04962, eq. 4)."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..architectures.location import Location
from ..ops import scale_heads
from .base import Intervention
from .composite import common_location, place_in
from .placement import Placement


class SteerVec(Intervention):
    """A vector for each layer, position slot and head (or whole site): h + β·v (arXiv 2410.04962, eq. 4).

    `vectors` is fp32 [L, P, H, D], or [G, L, P, H, D] when stacked. At the head site D is the head's width; at a whole
    site H is 1 and D the hidden size.
    """

    edits_own_heads: ClassVar[bool] = True
    activation_power: ClassVar[int] = 1
    vectors: nn.Parameter

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"vectors": (location.n_heads, location.width)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        shift = placement.of(self.of_layer(self.vectors, layer, x.device, placement.heads))
        return scale_heads(x, None, shift=shift, strength=strength, group=placement.group)

    def __add__(self, other: Intervention) -> Intervention:
        parts = [self, other]
        plain = all(type(part) is SteerVec and part.n_groups is None for part in parts)
        if plain and self.vectors.requires_grad == other.get_parameter("vectors").requires_grad:
            with contextlib.suppress(ValueError):  # places that cannot stand in one table
                total = SteerVec(common_location([part.location for part in parts]), device=self.device)
                with torch.no_grad():
                    for part in parts:
                        place_in(total, part)
                return total
        return super().__add__(other)
