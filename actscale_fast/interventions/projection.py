"""Setting an activation's projection on a direction: h + β·(t − ⟨h, u⟩)·u (arXiv 2410.12877)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..architectures.location import Location
from .base import Intervention
from .placement import Placement


class Projection(Intervention):
    """A direction u and a target t for each layer, position slot and head (or whole site): h + β·(t − ⟨h, u⟩)·u.

    With a unit vector u and β = 1, the projection ⟨h, u⟩ becomes t, whatever it was (instruction steering, arXiv
    2410.12877); t = 0 removes the direction. `directions` is fp32 [L, P, H, D] and `targets` fp32 [L, P, H], with a
    leading G when stacked. A direction of 0 does nothing. Computed in float32 (float64 for float64 activations) and
    rounded once.
    """

    homogeneous: ClassVar[bool] = False
    edits_own_heads: ClassVar[bool] = True
    directions: nn.Parameter
    targets: nn.Parameter

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"directions": (location.n_heads, location.width), "targets": (location.n_heads,)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        heads = placement.heads
        directions = placement.of(self.of_layer(self.directions, layer, x.device, heads))  # [G or R, 1 or T, H, D]
        targets = placement.of(self.of_layer(self.targets, layer, x.device, heads))  # [G or R, 1 or T, H]
        if placement.group is not None:
            directions, targets = directions[placement.group], targets[placement.group]
        beta = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
        wide = x.double() if x.dtype.itemsize == 8 else x.float()
        change = beta * (targets - (wide * directions).sum(-1))  # [B, T, H]
        return (wide + change[..., None] * directions).to(x.dtype)
