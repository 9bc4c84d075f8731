"""Steering vectors: h + β·v (arXiv 2410.04962, eq. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from ..architectures.location import Location
from ..ops import scale_heads
from .base import Intervention
from .positions import Placement


class SteerVec(Intervention):
    """One vector per layer, position slot and head (or whole site): h + β·v (arXiv 2410.04962, eq. 4).

    `vectors` is fp32 [L, P, H, D]: D is the head's width at the head site; at a whole one H is 1 and D the hidden size.
    """

    vectors: nn.Parameter

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"vectors": (location.n_heads, location.width)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        shift = placement.of(self.of_layer(self.vectors, layer, x.device))
        return scale_heads(x, None, shift=shift, strength=strength, group=placement.group)
