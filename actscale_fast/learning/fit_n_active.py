"""`fit(..., n_active=20)`: a path of weights of the ℓ1 norm, and the choice of the scalars to fit without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_counts
from ..interventions import ActivScalar, Intervention
from .engine import Engine, FitRequest
from .fit_settings import FitSettings
from .fit_state import FitState
from .minimality_share import resolved_minimality
from .objective import Objective

#: Each weight of the path is this part of the one before; the last is 0.3 % of λ_max.
_RATIO, _LONGEST = 0.75, 20
#: Weights that are tried between the last one that leaves few enough scalars and the first that does not.
_HALVINGS = 3
#: A fit of the path starts from the one before, so that it takes this part of the steps.
_PART = 3


def check_n_active(n_active: int, intervention: Intervention, checkpoint: Any) -> None:
    """Refuse what `n_active` cannot be combined with."""
    check_counts(n_active=n_active)
    if not all(isinstance(single, ActivScalar) and single.n_groups is None for single in intervention.singles):
        raise TypeError(
            f"n_active: got {type(intervention).__name__}, expected a single ActivScalar or a sum of some: other "
            "parameters are parts of vectors, which are not chosen one by one"
        )
    if n_active > intervention.n_parameters:
        raise ValueError(
            f"n_active: got {n_active}, expected at most {intervention.n_parameters}, the number of scalars"
        )
    if checkpoint is not None:
        raise ValueError("n_active: cannot be combined with a checkpoint, which holds the state of one fit")


def choose_active(
    engine: Engine, objective: Objective, settings: FitSettings, rows: Sequence[int], n_active: int, progress: bool
) -> list[dict[str, float]]:
    """Set the engine's intervention to the fit of a path that has the most, but at most n_active, scalars.

    The path begins at λ_max, where all scalars are 0, and each fit starts from the one before, with a third of the
    steps. It ends with the first fit that has more scalars; between that weight and the one before, three more are
    tried.

    Returns:
        One record per fit: minimality (λ_M), n_active, effectiveness and faithfulness.

    Raises:
        ValueError: the gradient at 0 is 0, or no fit of the path has from 1 to n_active scalars.
    """
    from tqdm.auto import tqdm

    parameters = list(engine.intervention.parameters())
    largest = resolved_minimality(engine, replace(objective, minimality="100%"), rows)
    shorter = replace(settings, steps=max(settings.steps // _PART, 1))
    path: list[dict[str, float]] = []
    best = [torch.zeros_like(value) for value in parameters]
    found, fits, beyond = 0, largest, math.nan  # the most scalars, its weight, the largest weight with too many
    halvings = 0
    with tqdm(desc="path", disable=not progress, unit="fit", leave=False, dynamic_ncols=True) as bar:
        while found < n_active and len(path) < _LONGEST and halvings < _HALVINGS:
            is_known = not math.isnan(beyond)
            weight = math.sqrt(fits * beyond) if is_known else fits * _RATIO
            _set(parameters, best)
            path.append(_fit_at(weight, engine, objective, shorter, rows))
            active = int(path[-1]["n_active"])
            bar.set_postfix_str(f"{active} active, wanted {n_active}", refresh=False)
            bar.update()
            if active > n_active:
                beyond = weight
            else:
                fits = weight
                if active >= found:
                    best, found = _values(parameters), active
            halvings += is_known
    _set(parameters, best)
    if not found:
        raise ValueError(
            f"n_active: got {n_active}, but no weight of the path leaves at least one and so few scalars (the fits "
            f"have {', '.join(str(int(record['n_active'])) for record in path)}); allow more, or take more steps"
        )
    return path


def masks(intervention: Intervention) -> list[Tensor]:
    """1 where a learned parameter is not 0, which is where gradients pass in the refit."""
    return [value.detach().ne(0).to(value.dtype) for value in intervention.parameters() if value.requires_grad]


def _fit_at(
    weight: float, engine: Engine, objective: Objective, settings: FitSettings, rows: Sequence[int]
) -> dict[str, float]:
    """Fit with this weight from the current values."""
    state = FitState(engine.intervention, replace(objective, minimality=weight), settings, rows)
    while not state.done():
        terms, gradients = engine.gradients([FitRequest(state.rows(), state.objective)])
        state.update(terms[0], gradients)
    state.read(wait=True)
    last = state.history[-1]
    return {"minimality": weight} | {name: last[name] for name in ("n_active", "effectiveness", "faithfulness")}


def _values(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone() for value in parameters]


@torch.no_grad()
def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
