"""A path of minimality weights, which begins at the smallest one that keeps every scalar at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ... import defaults
from ..._checks import check_counts, finite_number
from ...interventions import ActivScalar, Intervention
from ...tasks.loading import ExampleSource
from ..arguments import checked_location, checked_objective, refuse_inference_mode, refuse_tokenless
from ..encoded_examples import EncodedExamples
from ..engine import Engine, FitRequest
from ..fit_settings import FitSettings
from ..objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The largest weight is raised by this, because fits of a sweep share passes, which round gradients differently.
_ROUNDING = 1e-3


def minimality_path(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    n: int = 8,
    *,
    smallest: float = 0.02,
    objective: Objective | None = None,
    intervention: Intervention | None = None,
    steps: int = defaults.STEPS,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    betas: tuple[float, float] = (0.9, 0.99),
) -> list[float]:
    """Weights λ_M, evenly spaced on a logarithmic scale, from the one that keeps every scalar at 0 downwards.

    In a fit from α = 0 with these steps and batches, the gradients g_t are known in advance while α stays 0, and Adam's
    update leaves every scalar at 0 if λ_M ≥ max |m̂_t|, their bias-corrected running mean. The first weight is the
    largest of these over all steps, plus a thousandth for rounding; with a smaller one some scalar moves. A lasso's
    path begins at the same point (Friedman, Hastie and Tibshirani 2010, section 2.5). This takes the forward and
    backward passes of `steps` steps, or of one step if a batch holds all examples.

    Args:
        model, tokenizer, examples: as for `fit`.
        n: number of weights.
        smallest: the last weight, as a fraction of the first.
        objective: its other fields are used; None: `Objective()`.
        intervention: the intervention to be fitted, whose values do not matter; None: `ActivScalar.for_model(model)`.
        steps, batch_size, seed, betas: the settings of the fits, as for `fit` and `sweep`.

    Returns:
        n numbers, largest first.

    Raises:
        TypeError, ValueError: bad arguments or examples, or a gradient that is 0.
        RuntimeError: under torch.inference_mode().

    Example:
        >>> path = af.minimality_path(model, tokenizer, train)
        >>> af.sweep(model, tokenizer, train, {"minimality": path}, warm_start=True)
    """
    check_counts(n=n)
    settings = FitSettings(steps=steps, batch_size=batch_size, seed=seed, betas=betas)
    refuse_inference_mode("minimality_path")
    share = finite_number(smallest)
    if share is None or not 0 < share < 1:
        raise ValueError(f"smallest: got {smallest!r}, expected a number between 0 and 1")
    objective = checked_objective(objective)
    if objective.sparsity != "parameters":
        raise ValueError("objective: sparsity='scalars' makes no parameter exactly 0, so there is no such path")
    given = ActivScalar.for_model(model) if intervention is None else intervention
    location = checked_location(given)
    start = type(given)(location, device=given.device)  # at 0
    data = EncodedExamples(examples, tokenizer, model, location.paths)
    refuse_tokenless(start, data)
    with torch.enable_grad(), Engine(model, data, start, [objective]) as engine:
        largest = _largest_mean(engine, objective, settings, len(data))
    if not largest > 0:
        raise ValueError("examples: the objective's gradient at 0 is 0 for every scalar, so there is nothing to learn")
    return [(1 + _ROUNDING) * largest * share ** (index / max(n - 1, 1)) for index in range(n)]


def _largest_mean(engine: Engine, objective: Objective, settings: FitSettings, n_examples: int) -> float:
    """max |m̂_t| over the steps t of a fit and all scalars, with gradients taken at α = 0."""
    means: list[torch.Tensor] = []
    largest, decay = 0.0, settings.betas[0]
    for step in range(settings.steps if settings.batch_size < n_examples else 1):
        _, gradients = engine.gradients([FitRequest(settings.rows(n_examples, step), objective)])
        means = means or [torch.zeros_like(gradient, dtype=torch.float64) for gradient in gradients]
        for mean, gradient in zip(means, gradients, strict=True):
            mean.mul_(decay).add_(gradient.double(), alpha=1 - decay)
            largest = max(largest, float(mean.abs().max()) / (1 - decay ** (step + 1)))
    return largest
