"""Conversion between vectors by layer, which other libraries use, and a `SteerVec`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..architectures.layout import layout
from ..interventions import SteerVec
from ._named_modules import refuse_named_module


def from_vectors(
    vectors: Mapping[int, Any],
    model: Any,
    site: str = "residual",
    *,
    positions: Iterable[int] | None = None,
    generated: bool = False,
    model_type: str | None = None,
) -> SteerVec:
    """The vectors as a `SteerVec` with their layers, on the model's device.

    Args:
        vectors: layer (negative from the end) -> a real array or tensor [P, H, D], or [H·D] for all position slots.
        model: a causal language model of Hugging Face.
        site, positions, generated: as `SteerVec.for_model` takes them.
        model_type: the type of the model that the vectors were made for; None: unknown.

    Raises:
        TypeError, ValueError: another type of model, no layer, an unknown layer or one given twice, vectors of another
            width, or values that are not finite real numbers.
    """
    own = layout(model).model_type
    if model_type is not None and model_type != own:
        raise ValueError(f"model_type: the vectors were made for {model_type!r}, the model is {own!r}")
    made = SteerVec.for_model(model, site, list(vectors), positions, generated)
    for (layer, value), target in zip(vectors.items(), made.vectors.data, strict=True):  # target [P, H, D]
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"layer {layer}: got {tensor.dtype}, expected real numbers")
        if tensor.shape == (target[0].numel(),):
            tensor = tensor.view(target.shape[1:]).expand(target.shape)
        if tensor.shape != target.shape:
            raise ValueError(
                f"layer {layer}: got vectors of shape {tuple(tensor.shape)}, expected {tuple(target.shape)} or"
                f" ({target[0].numel()},) for site {site!r} of this model"
            )
        target.copy_(tensor)
    made.check_finite()
    return made


def whole_vectors(vector: SteerVec, sites: Iterable[str], target: str) -> dict[int, Tensor]:
    """{layer: float32 [d] on the CPU} of a vector that steers every token at one of the given whole sites.

    Raises:
        TypeError, ValueError: not a SteerVec, a stack, positions, or a site that `target` does not have, or has another
            module at.
    """
    check_vector(vector)
    location = vector.location
    if location.positions is not None:
        raise ValueError(f"steer_vec: it has positions, but vectors of {target} act on every token")
    if location.site not in sites:
        raise ValueError(f"steer_vec: its site is {location.site!r}; {target} only has {', '.join(sites)}")
    refuse_named_module("steer_vec", location, target)
    return {layer: value.reshape(-1) for layer, value in by_layer(vector).items()}


def check_vector(vector: object) -> None:
    """Raise an error unless it is a single, finite `SteerVec`."""
    if not isinstance(vector, SteerVec):
        raise TypeError(f"steer_vec: got {type(vector).__name__}, expected a SteerVec")
    if vector.n_groups is not None:
        raise ValueError(f"steer_vec: got a stack of {vector.n_groups}, expected one of its parts")
    vector.check_finite()


def by_layer(vector: SteerVec) -> dict[int, Tensor]:
    """{layer: float32 [P, H, D], a copy on the CPU}, in ascending order."""
    values = vector.vectors.detach().to("cpu", copy=True)
    return dict(sorted(zip(vector.location.layers, values, strict=True)))
