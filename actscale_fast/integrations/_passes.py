"""The contexts of an intervention whose edits another library calls: strength, groups and positions, without hooks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..interventions import Intervention
from ..interventions.positions import EVERYWHERE
from ..models.context import Context
from ..models.patch import Patch, _checked_group, _Edit


class Passes(Patch):
    """A patch that is attached to nothing: whoever made it calls its edits, and sets `context` where tokens matter.

    Values are not looked at, so that making one never waits for the device.

    Args:
        intervention: of one place; it needs no source.
        device: where the edited layers compute.
        strength, group: as `af.patch` takes them.
    """

    def __init__(
        self, intervention: Intervention, device: torch.device, strength: float | Tensor, group: Tensor | None
    ) -> None:
        if intervention.needs_source:
            raise TypeError(
                f"intervention: {type(intervention).__name__} needs the activations of a source; af.patch and"
                " af.interchange give them"
            )
        self.intervention = intervention
        self.context = None
        self.paused = False
        self._home = device
        self._group = _checked_group(group, intervention.n_groups, device)
        self._plain = Context(EVERYWHERE, 1.0)
        self._layers, self._edits = [], []
        self.strength = strength
        if intervention.device != device:
            intervention.to(device)

    def remove(self) -> None:
        """Nothing: it is attached to nothing."""

    def edits(self) -> Iterator[tuple[int, _Edit]]:
        """(number of the layer, its edit): a function of the activation [B, T, H·D] or [B, T, d]."""
        for index, layer in enumerate(self.intervention.location.layers):
            yield layer, _Edit(self, index)


def passes_of(
    intervention: Intervention, device: torch.device, strength: float | Tensor, group: Tensor | None
) -> list[Passes]:
    """One for each place of the intervention, in order; a `Composite`'s parts carry its factors."""
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    parts = [Passes(part, device, strength, group) for part in intervention.singles]
    for part, factor in zip(parts, getattr(intervention, "factors", (1.0,)), strict=True):
        part.strength = factor * part.strength
    return parts
