"""Each site: scalars on every token, at every layer that has it, against the oracle."""

from __future__ import annotations

import warnings

import torch

import actscale_fast as af

from .oracle import call
from .subject import IDS, OracleError, Subject, factors_of, randomise
from .verdicts import CANNOT_ACT, CRASH, NAMED, REFUSED, RIGHT, UNCHECKED, WRONG, Verdict, attempt


def check_site(subject: Subject, site: str) -> Verdict:
    """A site as the package finds it; where it refuses, also with the module paths named."""
    verdict = attempt(lambda: _site(subject, site, {}))
    if verdict.verdict != REFUSED:
        return verdict
    left = verdict
    for paths in subject.paths(site):
        named = attempt(lambda paths=paths: _site(subject, site, paths))  # type: ignore[misc]
        told = ", ".join(f"{name}={path!r}" for name, path in paths.items())
        if named.verdict == RIGHT:
            return Verdict(NAMED, told, paths)
        if named.verdict in (WRONG, CRASH):
            return Verdict(named.verdict, f"with {told}: {named.detail}")
        if named.verdict == REFUSED and named.detail != verdict.detail:
            left = Verdict(REFUSED, f"with {told}: {named.detail}")
    return left


def _site(subject: Subject, site: str, paths: dict[str, str]) -> Verdict:
    """An intervention on every layer that has the site, on every token."""
    model, oracle = subject.model, subject.oracle
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        intervention = randomise(af.ActivScalar.for_model(model, site=site, **paths))
        with torch.no_grad(), af.patch(model, intervention, strength=0.8):
            found = call(model, IDS)
    wanted = oracle.acts_at(site)
    if wanted is None:
        return Verdict(UNCHECKED, "accepted, and the oracle has no such site")
    extra = sorted(set(intervention.location.layers) - set(wanted))
    if extra:
        return Verdict(UNCHECKED, f"accepted at layers {extra}, where the oracle has no such site")
    try:
        factors = factors_of(intervention, oracle, 0.8)
    except OracleError as error:
        return Verdict(WRONG, str(error))
    with torch.no_grad():
        expected = oracle.logits(IDS, site, factors)
        positive = {layer: torch.linspace(1.7, 0.5, value.shape[1])[None].double() for layer, value in factors.items()}
        kept_sign = oracle.logits(IDS, site, positive)
        turned = oracle.logits(IDS, site, {layer: -value for layer, value in positive.items()})
    right, error = subject.agrees(found, expected, subject.plain)
    if not right:
        return Verdict(WRONG, f"off by {error:.2g} of the effect")
    effect = float((turned - subject.plain).abs().max())
    if float((kept_sign - subject.plain).abs().max()) <= 0.02 * effect:
        warned = any("norm" in str(one.message) or "nothing" in str(one.message) for one in said)
        told = "for_model warns" if warned else "for_model does not warn"
        return Verdict(CANNOT_ACT, f"a norm follows: a positive factor does nothing ({told})")
    missing = sorted(set(wanted) - set(intervention.location.layers))
    return Verdict(RIGHT, f"layers {missing} are left out" if missing else "")
