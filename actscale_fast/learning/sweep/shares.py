"""Points of a grid with shares: what they are shares of, λ_max and sizes of activations, is found before the fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activation_size import ZeroActivationError, activation_sizes
from ..encoded_examples import EncodedExamples, evenly_spaced
from ..engine import Engine
from ..execution import Execution
from ..minimality_share import resolved_minimality
from ..zero_gradient import ZeroGradientError
from .grid import Point

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_shares(
    model: PreTrainedModel, data: EncodedExamples, made: Sequence[Point], rows_of: dict[str | None, range],
    execution: Execution,
) -> None:  # fmt: skip
    """Replace each share by a number; λ_max is computed once for all points that agree in what it depends on.

    A point without a λ_max, because nothing can move or terms are not finite, gets an `error`.

    Raises:
        ValueError, FloatingPointError: no point has one.
    """
    largest: dict[Any, float | ZeroGradientError | FloatingPointError] = {}
    for point in made:
        share = point.objective.minimality_share
        if share is None:
            continue
        if point.known_weight is not None:
            point.objective = replace(point.objective, minimality=point.known_weight)
            continue
        whole = replace(point.objective, minimality="100%", faithfulness=0.0)
        place = point.intervention.location
        where = (place.module_key, place.layers, place.positions)
        key = (point.task, whole, type(point.intervention), where, place.generated)
        if key not in largest:
            rows = rows_of[point.task]
            opened = Engine(model, data, point.intervention, [whole], execution, stages=[evenly_spaced(rows)])
            with torch.enable_grad(), opened as engine:
                try:
                    largest[key] = resolved_minimality(engine, whole, rows)
                except (ZeroGradientError, FloatingPointError) as error:
                    largest[key] = error
        found = largest[key]
        if not isinstance(found, float):
            point.error = f"{point.label}: {found}"
            found = 0.0
        point.objective = replace(point.objective, minimality=float(f"{share * found:.4g}"))
    _refuse_without_points(made, [found for found in largest.values() if isinstance(found, Exception)])


def measure_sizes(
    model: PreTrainedModel, data: EncodedExamples, made: Sequence[Point], rows_of: dict[str | None, range]
) -> None:
    """Measure the activations of which learning rates are shares, once for all points that agree in where they are.

    A point whose activations are 0 or not finite gets an `error`.

    Raises:
        ValueError, FloatingPointError: no point is left.
    """
    found: dict[Any, list[Tensor | None] | ZeroActivationError | FloatingPointError] = {}
    for point in made:
        if not point.settings.is_relative or point.error is not None:
            continue
        place = point.intervention.location
        key = (point.task, place.module_key, place.layers, place.positions)
        if key not in found:
            try:
                found[key] = activation_sizes(model, data, point.intervention, rows_of[point.task])
            except (ZeroActivationError, FloatingPointError) as error:
                found[key] = error
        sizes = found[key]
        if isinstance(sizes, list):
            point.sizes = sizes
            continue
        reason = sizes.with_lr(point.settings.lr) if isinstance(sizes, ZeroActivationError) else sizes
        point.error = f"{point.label}: {reason}"
    _refuse_without_points(made, [sizes for sizes in found.values() if isinstance(sizes, Exception)])


def _refuse_without_points(made: Sequence[Point], errors: Sequence[Exception]) -> None:
    """Raise the first point's error if no point can begin."""
    if all(point.error for point in made):
        kind = ValueError if any(isinstance(error, ValueError) for error in errors) else FloatingPointError
        raise kind(f"grid: {made[0].error}")
