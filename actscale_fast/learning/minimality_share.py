"""λ_max, of which `Objective(minimality="10%")` is a share: the smallest weight that keeps every parameter at 0."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..interventions import Intervention, Projection
from .encoded_examples import evenly_spaced
from .engine import Engine, FitRequest
from .objective import Objective
from .zero_gradient import refuse_zero


def resolved_minimality(engine: Engine, objective: Objective, rows: Sequence[int]) -> float:
    """λ_M in numbers, with four digits, so that it does not depend on how passes are rounded.

    λ_max is the largest absolute value of the gradient of E at 0 over the examples (that of the KL is 0 there). With
    λ_M ≥ λ_max, 0 is a local minimum of the objective, as at the beginning of a lasso's path (Friedman, Hastie and
    Tibshirani 2010, section 2.5). It does not depend on the batch size, the seed or where the fit starts. A fit in
    small batches, whose gradients scatter, may still leave 0 at somewhat larger weights; `minimality_path` begins above
    them. This takes one forward and backward pass of at most 64 examples, evenly spaced, because a fit on many examples
    does not run all of them either.

    Args:
        engine: an open engine of a single intervention.
        objective: gives the share; any objective with the same `exclude_answers` and `kl` as one of the engine's.
        rows: the fit's examples among those of the engine.

    Raises:
        ValueError: the gradient at 0 is 0, so that λ_max is; the message names the likely causes.
        FloatingPointError: it is not finite.
    """
    share = objective.minimality_share
    if share is None:
        return objective.minimality_weight
    if any(isinstance(single, Projection) for single in engine.intervention.singles):
        raise ValueError(
            f"minimality: got {objective.minimality!r}, expected a number: a Projection has no gradient at 0, so there "
            "is no λ_max to take a share of"
        )
    alone = replace(objective, minimality=0.0, faithfulness=0.0)
    looked_at = evenly_spaced(rows)
    with _at_zero(engine.intervention), torch.enable_grad():
        terms, gradients = engine.gradients([FitRequest(looked_at, alone)])
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    if not math.isfinite(largest):
        figures = dict(zip(("effectiveness", "faithfulness"), terms[0].tolist(), strict=False))
        bad = [f"the {name} term is {value}" for name, value in figures.items() if not math.isfinite(value)]
        what = bad[0] if bad else "the gradient at 0 is not finite"
        raise FloatingPointError(f"before step 0: {what}, so λ_max is not known")
    if largest == 0:
        refuse_zero(engine.found.model, engine.data, engine.intervention, objective, looked_at, float(terms[0, 0]))
    return float(f"{share * largest:.4g}")


@contextlib.contextmanager
def _at_zero(intervention: Intervention) -> Iterator[None]:
    """Set all learned parameters to 0 inside the block."""
    learned = [value for value in intervention.parameters() if value.requires_grad]
    before = [value.detach().clone() for value in learned]
    try:
        for value in learned:
            value.data.zero_()
        yield
    finally:
        for value, old in zip(learned, before, strict=True):
            value.data.copy_(old)
