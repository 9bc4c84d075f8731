"""Dynamic activation scalars: h·(1 + β·⟨u, h⟩) (arXiv 2410.04962, eq. 10)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..architectures.location import Location
from ..ops import dynamic_scale
from .base import Intervention
from .placement import Placement


@dataclass(frozen=True, slots=True)
class Produced:
    """The scalars that one layer produced in one forward pass."""

    scalars: Tensor  # α, float32 [B, T, H], with its autograd graph
    steered: Tensor | None  # bool [R, T], R = B or 1: the tokens that were scaled; None: all


class DynScalar(Intervention):
    """A probe vector u for each layer and head (or whole site), shared by positions: h·(1 + β·⟨u, h⟩).

    This is eq. 10 of arXiv 2410.04962, without a bias. The scalar ⟨u, h⟩ is computed from the activation itself, so
    that what is learned on prompts of one length applies to any. `probes` is fp32 [L, 1, H, D], or [G, L, 1, H, D] when
    stacked. At the head site D is the head's width; at a whole site H is 1 and D the hidden size. A list of positions
    selects the tokens that are scaled; they share the probe, as generated tokens do.
    """

    shares_positions: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True
    edits_own_heads: ClassVar[bool] = True
    activation_power: ClassVar[int] = -1
    probes: nn.Parameter
    _produced: list[Produced] | None = None

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"probes": (location.n_heads, location.width)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        probes = self.of_layer(self.probes, layer, x.device, placement.heads).squeeze(1)  # [G, H, D]
        steered, group = placement.steered(self.location.n_slots), placement.group
        if placement.index is not None:
            alone = self.n_groups in (None, 1)
            group = None if alone else placement.index[:, 0] // (self.location.n_slots + 1)
        y, scalars = dynamic_scale(x, probes, strength=strength, group=group, return_scalars=True)
        if self._produced is not None:
            whole = scalars if placement.heads is None else placement.heads.join(scalars, 2)
            self._produced.append(Produced(whole, steered))
        return y if steered is None else torch.where(steered[:, :, None, None], y, x)

    def full_step(self, sizes: Tensor) -> Tensor:
        return 1 / (sizes * self.location.width)  # ⟨u, h⟩ sums over as many entries

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Produced]]:
        """Record the scalars that forward passes in the `with` block produce, one item per layer, for a penalty."""
        before = self._produced
        noted: list[Produced] = []
        self._produced = noted
        try:
            yield noted
        finally:
            self._produced = before


def produced_l1(noted: list[Produced], real: Tensor | None = None) -> Tensor:
    """For each row, Σ over layers and heads of the mean |α| over the steered tokens; float32 [B], differentiable.

    Args:
        noted: the list that `DynScalar.noting` filled in one forward pass.
        real: bool [B, T], tokens that are not padding; None: all.
    """
    total: Tensor | None = None
    for part in noted:
        sums = part.scalars.abs().sum(-1)  # [B, T]
        counted = torch.ones_like(sums, dtype=torch.bool) if part.steered is None else part.steered.expand_as(sums)
        if real is not None:
            counted = counted & real.to(sums.device)
        # Not a product: a padding token may be infinite or NaN.
        mean = torch.where(counted, sums, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
        total = mean if total is None else total + mean.to(total.device)
    if total is None:
        raise ValueError("noted: got no layer, expected at least one")
    return total
