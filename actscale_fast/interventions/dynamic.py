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
    """The scalars that one layer made in one forward pass."""

    scalars: Tensor  # α, float32 [B, T, H], with its graph
    steered: Tensor | None  # bool [R, T], R = B or 1: the tokens that were scaled; None: all


class DynScalar(Intervention):
    """One probe vector per layer and head (or whole site), shared by positions: h·(1 + β·⟨u, h⟩) (eq. 10).

    The scalar is read off the activation itself, so that what is learned on prompts of one length applies to any.
    `probes` is fp32 [L, 1, H, D]: D is the head's width at the head site; at a whole one H is 1 and D the hidden size.
    A list of positions says which tokens are scaled; they share the probe, generated ones included. Eq. 10 has no bias.
    """

    shares_positions: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True
    probes: nn.Parameter
    _produced: list[Produced] | None = None

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"probes": (location.n_heads, location.width)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        probes = self.of_layer(self.probes, layer, x.device).squeeze(1)  # [G, H, D]
        steered, group = placement.steered(self.location.n_slots), placement.group
        if placement.index is not None:
            alone = self.n_groups in (None, 1)
            group = None if alone else placement.index[:, 0] // (self.location.n_slots + 1)
        y, scalars = dynamic_scale(x, probes, strength=strength, group=group, return_scalars=True)
        if self._produced is not None:
            self._produced.append(Produced(scalars, steered))
        return y if steered is None else torch.where(steered[:, :, None, None], y, x)

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Produced]]:
        """Note the scalars that forward passes inside produce, one item a layer; for a penalty on them."""
        before = self._produced
        noted: list[Produced] = []
        self._produced = noted
        try:
            yield noted
        finally:
            self._produced = before


def produced_l1(noted: list[Produced], real: Tensor | None = None) -> Tensor:
    """Σ over layers and heads of the mean of |α| over the steered tokens, for each row; float32 [B] with its graph.

    Args:
        noted: of `DynScalar.noting`, each of the same rows.
        real: bool [B, T], tokens that are not padding; None: all.
    """
    total: Tensor | None = None
    for part in noted:
        sums = part.scalars.abs().sum(-1)  # [B, T]
        counted = torch.ones_like(sums, dtype=torch.bool) if part.steered is None else part.steered.expand_as(sums)
        if real is not None:
            counted = counted & real.to(sums.device)
        # Not a product: a padding token may hold anything.
        mean = torch.where(counted, sums, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
        total = mean if total is None else total + mean.to(total.device)
    if total is None:
        raise ValueError("noted: got no layer, expected at least one")
    return total
