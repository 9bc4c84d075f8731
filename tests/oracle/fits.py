"""Fits: the engine's value and gradient, and what the public call makes of a site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import actscale_fast as af

from .objective import EXAMPLES, Examples, full_objective, tokenizer
from .subject import PROMPTS, Subject, randomise
from .verdicts import RIGHT, WRONG, Verdict


def check_fit(subject: Subject, site: str, paths: dict[str, str]) -> Verdict:
    """Value and gradient of the engine against plain whole passes: at all layers and tokens scalars at 0 and away from
    it, at the highest layer away from it, at the last token at 0.
    """
    model, oracle = subject.model, subject.oracle
    objective = af.Objective(margin=3.0, faithfulness=0.7, minimality=0.0)
    layers = list(af.ActivScalar.for_model(model, site=site, **paths).location.layers)
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 0.0),
        ({}, 0.3),
        ({"layers": layers[-1:]}, 0.3),
        ({"positions": [-1]}, 0.0),
    ]
    for arguments, scale in cases:
        intervention = randomise(af.ActivScalar.for_model(model, site=site, **paths, **arguments), scale=scale)
        terms, gradient = engine_objective(model, intervention, objective)
        value, expected = full_objective(oracle, intervention, objective, PROMPTS)
        off = float((terms[:2].double() - value).abs().max()) / max(float(value.abs().max()), 1e-3)
        size = max(float(expected.abs().max()), 1e-2 * float(value.abs().max()))
        off = max(off, float((gradient.double() - expected).abs().max()) / size)
        limit = 2e-5 if subject.dtype == torch.float64 else 2e-3
        if not off <= limit:
            where = ", ".join(f"{name}={value}" for name, value in arguments.items()) or "all layers"
            return Verdict(WRONG, f"{where}, scalars of {scale}: off by {off:.2g}{subject.about_padding()}")
    public_fit(model, site, paths, objective)
    return Verdict(RIGHT)


def public_fit(model: Any, site: str, paths: dict[str, str], objective: Any) -> None:
    """One update by the public call, which refuses what cannot be learned."""
    intervention = af.ActivScalar.for_model(model, site=site, **paths)
    af.fit(model, tokenizer(), EXAMPLES, intervention, objective, steps=1, batch_size=3, progress=False)


def fit_runs(subject: Subject, site: str) -> Verdict:
    """Whether the public call takes a site that cannot act."""
    public_fit(subject.model, site, {}, af.Objective())
    return Verdict(RIGHT)


def engine_objective(model: Any, intervention: Any, objective: Any) -> tuple[Tensor, Tensor]:
    """Terms and the scalars' gradient from one step of the engine."""
    from actscale_fast.learning.engine import Engine, FitRequest

    with Engine(model, Examples(PROMPTS), intervention, [objective]) as engine:
        terms, gradients = engine.gradients([FitRequest(list(range(len(PROMPTS))), objective)])
    return terms[0], gradients[0]
