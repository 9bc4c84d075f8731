"""What a learning rate of 100% is in the units of each parameter, where the rate is a share of activations' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..interventions import Intervention


class FullSteps:
    """The full step of each learned parameter whose unit depends on the activation's size.

    Args:
        intervention: a single intervention, a stack or a composite.
        named: its learned parameters by name.
    """

    def __init__(self, intervention: Intervention, named: Mapping[str, Tensor]) -> None:
        self.parts = intervention.singles
        names = {id(value): name for name, value in named.items()}
        #: float32 [L, 1, …] by the parameter's name, which broadcasts over it; NaN: not known yet.
        self.of: dict[str, Tensor] = {}
        self._part: dict[str, int] = {}
        for index, part in enumerate(self.parts):
            for value in part.parameters() if part.activation_power else ():
                if id(value) in names:
                    n_axes = value.dim() - (part.n_groups is not None)
                    shape = (len(part.location.layers), *[1] * (n_axes - 1))
                    self.of[names[id(value)]] = torch.full(shape, torch.nan, dtype=torch.float32, device=value.device)
                    self._part[names[id(value)]] = index

    @property
    def are_known(self) -> bool:
        """Whether the sizes of all activations are known."""
        return not any(bool(step.isnan().any()) for step in self.of.values())

    def set_sizes(self, sizes: Sequence[Tensor | None]) -> None:
        """Set the sizes of the activations that the parts edit, as `activation_sizes` returns them."""
        for name, step in self.of.items():
            index = self._part[name]
            size = sizes[index]
            assert size is not None
            step.copy_(self.parts[index].full_step(size).view_as(step))
