"""Heads by what a gradient predicts of their removal, by what removing each one changes, or at random."""

from __future__ import annotations

import torch

from ..attribution.attribution import attribution
from .subject import Scored, Subject


def by_attribution(subject: Subject) -> Scored:
    """The derivative of the mean logit difference by each head's scalar at 0: one forward and one backward pass.

    Score: its magnitude. α has its sign, so that the chosen heads together raise the difference (to first order).
    """
    found = attribution(
        subject.model, subject.tokenizer, subject.examples, intervention=subject.scalars, knock_out=False,
        batch_size=subject.batch_size, cache_bytes=subject.cache_bytes, progress=subject.progress,
    )  # fmt: skip
    slopes = found.scores[:, 0]
    return Scored(slopes.abs(), slopes.sign())


def by_knock_out(subject: Subject) -> Scored:
    """The change of the mean logit difference when one head at a time is removed, measured in row groups.

    Score: its magnitude. α amplifies a head whose removal lowers the difference, and suppresses the others.
    """
    found = attribution(
        subject.model, subject.tokenizer, subject.examples, intervention=subject.scalars, knock_out=True,
        batch_size=subject.batch_size, cache_bytes=subject.cache_bytes, progress=subject.progress,
    )  # fmt: skip
    assert found.knock_out is not None
    changes = found.knock_out[:, 0]
    return Scored(changes.abs(), -changes.sign())


def at_random(subject: Subject) -> Scored:
    """Uniform scores and random signs, from the seed: the control that every method must beat."""
    generator = torch.Generator().manual_seed(subject.seed)
    scores = torch.rand(subject.shape, generator=generator, dtype=torch.float32, device="cpu")
    signs = torch.rand(subject.shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    return Scored(scores, torch.where(signs, -1.0, 1.0))
