"""The location of a new intervention, checked against its model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from .hugging_face import execution_device
from .layout import layout
from .location import Location, check_site
from .site_after_norm import offer_of_site_after_norm
from .site_check import idle_layers, require_site, running_layers


def locate(
    model: nn.Module,
    site: str,
    layers: Iterable[int] | None,
    positions: tuple[int, ...] | None,
    generated: bool,
    paths: dict[str, str],
    *,
    scales: bool,
) -> tuple[Location, torch.device]:
    """The checked location of a new intervention, and the device that its parameters belong on.

    Args:
        scales: whether the intervention multiplies by factors; layers where these change nothing then cause a warning.
    """
    found = layout(model, paths)
    if layers is None:  # cross-attention to images does not run on text
        layers = running_layers(found, check_site(site), found.chosen(site, None))
    location = found.location(check_site(site), layers, positions, generated, paths)
    first = found.site_module(site, location.layers[0])
    require_site(found, site, location.layers)
    idle = idle_layers(found, site, location.layers) if scales else []
    if idle:
        warnings.warn(
            f"site: {site!r} of {found.model_type!r} cannot act at layer{'s' * (len(idle) > 1)} "
            f"{', '.join(map(str, idle))}: a norm follows that undoes every positive factor 1 + β·α"
            f"{offer_of_site_after_norm(found, site, idle)}",
            stacklevel=4,
        )
    return location, execution_device(first) or torch.device("cpu")
