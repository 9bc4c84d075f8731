"""Where a path of minimality weights begins: at the smallest one that keeps every scalar at 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..interventions import ActivScalar, Intervention
from .encoding import EncodedExamples
from .engine import Engine, Share
from .examples import Example
from .fitting import checked_location, checked_objective, refuse_inference_mode
from .objective import Objective
from .settings import check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def minimality_path(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    n: int = 8,
    *,
    smallest: float = 0.02,
    objective: Objective | None = None,
    intervention: Intervention | None = None,
) -> list[float]:
    """Weights λ_M from the one that keeps every scalar at 0 down, evenly spread on a logarithmic scale.

    At α = 0 the objective's gradient over all examples is g; a step of all of them leaves every scalar at 0 where λ_M ≥
    max |g|, and one of a smaller batch may not. A lasso's path begins there too (Friedman, Hastie and Tibshirani 2010,
    section 2.5).

    Args:
        model, tokenizer, examples: as `fit` takes them.
        n: how many.
        smallest: the last one, as a share of the first.
        objective: its other fields count; `Objective()` where None.
        intervention: what is to be fitted, default `ActivScalar.for_model(model)`; its values do not matter.

    Returns:
        n numbers, the largest first.

    Raises:
        TypeError, ValueError: bad arguments or examples, a gradient that is 0.
        RuntimeError: under torch.inference_mode().

    Example:
        >>> path = af.minimality_path(model, tokenizer, train)
        >>> af.sweep(model, tokenizer, train, {"minimality": path}, warm_start=True)
    """
    check_counts(n=n)
    refuse_inference_mode("minimality_path")
    if not isinstance(smallest, int | float) or not 0 < smallest < 1:
        raise ValueError(f"smallest: got {smallest!r}, expected a number between 0 and 1")
    objective = checked_objective(objective)
    if objective.sparsity != "parameters":
        raise ValueError("objective: sparsity='scalars' makes no parameter exactly 0, so that no path begins there")
    given = ActivScalar.for_model(model) if intervention is None else intervention
    location = checked_location(given)
    start = type(given)(location, device=given.device)  # at 0
    data = EncodedExamples(examples, tokenizer, model, location.paths)
    with torch.enable_grad(), Engine(model, data, start, [objective]) as engine:
        _, gradients = engine.gradients([Share(range(len(data)), objective)])
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    if not largest > 0:
        raise ValueError("examples: the objective's gradient at 0 is 0 in every scalar, expected one that is not")
    return [largest * smallest ** (index / max(n - 1, 1)) for index in range(n)]
