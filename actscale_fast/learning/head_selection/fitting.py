"""Values of α for given heads by this package's own objective, and the choice of heads by its ℓ1 path."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ... import defaults
from ...interventions import ActivScalar
from ..arguments import checked_objective
from ..engine import Engine, FitRequest
from ..execution import Execution
from ..fit import fit
from ..fit_settings import FitSettings
from ..fit_state import FitState
from ..objective import Objective
from .subject import Scored, Subject


def refitted(
    subject: Subject,
    chosen: Tensor,
    *,
    objective: Objective | None = None,
    steps: int = defaults.STEPS,
    lr: float | str = defaults.LR,
    fit_batch_size: int = defaults.BATCH_SIZE,
) -> Tensor:
    """α [L, H] of the chosen heads, learned by the objective without its ℓ1 term; all others stay 0.

    Args:
        subject: the model and the examples.
        chosen: bool [L, H].
        objective, steps, lr: as in `fit`.
        fit_batch_size: prompts per step.
    """
    location = subject.scalars.location
    at = chosen.any(1).nonzero().flatten().tolist()  # layers without a chosen head need not run for the gradient
    scalars = ActivScalar.for_model(subject.model, "head", [location.layers[index] for index in at])
    objective = replace(checked_objective(objective), minimality=0.0)
    settings = FitSettings(steps, lr, fit_batch_size, subject.seed).for_intervention(scalars)
    rows = range(len(subject.data))
    state = FitState(scalars, objective, settings, rows)
    mask = chosen[at][:, None].to(scalars.alpha)
    execution = Execution(cache_bytes=subject.cache_bytes, distributed=False)
    with torch.enable_grad(), Engine(subject.model, subject.data, scalars, [objective], execution) as engine:
        while not state.done():
            terms, gradients = engine.gradients([FitRequest(state.rows(), objective)])
            state.update(terms[0], [gradients[0] * mask[..., : gradients[0].shape[-1]]])
        state.read(wait=True)
    alpha = torch.zeros(subject.shape, dtype=torch.float32, device="cpu")
    alpha[at, : scalars.alpha.shape[-1]] = scalars.alpha.detach()[:, 0].float().cpu()
    return alpha


def by_path(
    subject: Subject,
    k: int,
    *,
    objective: Objective | None = None,
    steps: int = defaults.STEPS,
    lr: float | str = defaults.LR,
    fit_batch_size: int = defaults.BATCH_SIZE,
) -> Scored:
    """At most k heads by `fit(..., n_active=k)`: a path of weights of the ℓ1 norm, then a refit. Scores: |α|.

    Args:
        subject: the model and the examples.
        k: the number of heads.
        objective, steps, lr: as in `fit`.
        fit_batch_size: prompts per step.
    """
    scalars = ActivScalar(subject.scalars.location, device=subject.scalars.device)
    result = fit(
        subject.model, subject.tokenizer, subject.examples, scalars, objective, steps=steps, lr=lr,
        batch_size=fit_batch_size, seed=subject.seed, n_active=k, progress=subject.progress,
        execution=Execution(cache_bytes=subject.cache_bytes, distributed=False),
    )  # fmt: skip
    alpha = scalars.alpha.detach()[:, 0].float().cpu()
    return Scored(alpha.abs(), alpha, {"path": result.path})
