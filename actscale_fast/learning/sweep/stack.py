"""The stack of interventions that the fits of a sweep in progress share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...interventions import Intervention


def union(interventions: Sequence[Intervention], n_groups: int) -> Intervention:
    """A stack with one group for each, at all layers that any of them has."""
    first = interventions[0]
    layers = tuple(sorted({layer for one in interventions for layer in one.location.layers}))
    return type(first)(replace(first.location, layers=layers), n_groups=n_groups, device=first.device)


def places(stack: Intervention, intervention: Intervention) -> Tensor:
    """The indices of the intervention's layers among the stack's, int64 [L]."""
    layers = intervention.location.layers
    return torch.tensor([stack.location.layers.index(layer) for layer in layers], device=stack.device)


def copy_values(source: Intervention, target: Intervention) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))
