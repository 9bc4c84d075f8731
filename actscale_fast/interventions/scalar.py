"""Activation scalars: h·(1 + β·α) (arXiv 2410.04962, eq. 5)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..architectures.location import Location
from ..ops import scale_heads
from .base import Intervention
from .placement import Placement


class ActivScalar(Intervention):
    """A signed scalar for each layer, position slot and head (or whole site): h·(1 + β·α).

    This is eq. 5 of arXiv 2410.04962. `alpha` is fp32 [L, P, H] at the head site, [L, P, 1] at a whole site, and
    [G, L, P, ·] when stacked. α = 0 is the identity, α = −1 with β = 1 removes the head, and β = −1 inverts the
    intervention.
    """

    multiplies: ClassVar[bool] = True
    alpha: nn.Parameter

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"alpha": (location.n_heads,)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        alpha = placement.of(self.of_layer(self.alpha, layer, x.device))
        return scale_heads(x, alpha, strength=strength, group=placement.group)
