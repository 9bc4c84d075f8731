"""JuICE: heads by how much scaling each one raises the correct answer's probability (arXiv 2503.10996).

Every head is scaled alone, h·(1 + α), by each of some positive and some negative α. A head's two scores are the mean
gain of p(correct) over the examples and the positive α, and over the negative ones. The paper averages over three kinds
of prompts (without a conflict, with a substituted fact, with a coherent counterfactual text), four of each: for its
protocol, give examples of `tasks.knowledge_conflicts`, of which equally many of each kind are taken.

Our reading: a head takes the sign of its better score, and the k best heads are chosen among all; the paper keeps the
best of each sign and searches for the strength of each on a grid, here one strength serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..._checks import check_counts, check_finite
from ...modules.evaluation_mode import evaluation_mode
from ...tasks.examples import Example
from ...tasks.known_prompts import conflict_kind
from ..attribution.knock_out import KnockOut
from .subject import Scored, Subject

POSITIVE = (1.0, 3.0, 5.0, 10.0, 30.0)
NEGATIVE = (-1.0, -2.0, -5.0)
#: Examples that heads are scored on; the paper takes four of each kind.
N_SCORED = 12


def by_gain(
    subject: Subject,
    *,
    positive: Sequence[float] = POSITIVE,
    negative: Sequence[float] = NEGATIVE,
    n_scored: int = N_SCORED,
) -> Scored:
    """Scores by the mean gain of p(correct); see the module.

    Args:
        subject: the model and the examples, of which evenly spaced ones are used.
        positive, negative: the α that each head is scaled by.
        n_scored: the largest number of examples.
    """
    check_counts(n_scored=n_scored)
    _check_scales("positive", positive, 1)
    _check_scales("negative", negative, -1)
    some = scored_examples(subject.examples, n_scored)
    if len(some) < len(subject.examples):
        subject = replace(subject, examples=some)
    gains = [torch.stack([gain(subject, alpha) for alpha in scales]).mean(0) for scales in (positive, negative)]
    scores = torch.maximum(*gains)
    directions = torch.where(gains[0] >= gains[1], 1.0, -1.0)
    details = {
        "n_scored": len(subject.examples),
        "gain_positive": gains[0].tolist(),
        "gain_negative": gains[1].tolist(),
    }
    return Scored(scores, directions, details)


def scored_examples(examples: Sequence[Example], n: int) -> list[Example]:
    """At most n of the examples, evenly spaced; where all are knowledge conflicts, evenly spaced within each kind."""
    if len(examples) <= n:
        return list(examples)
    kinds: dict[str | None, list[Example]] = {}
    for example in examples:
        kinds.setdefault(conflict_kind(example), []).append(example)
    if None in kinds or n < len(kinds):
        kinds = {None: list(examples)}
    chosen = []
    for number, some in enumerate(kinds.values()):
        share = min(n // len(kinds) + (number < n % len(kinds)), len(some))
        chosen += [some[index * len(some) // share] for index in range(share)]
    return chosen


def gain(subject: Subject, alpha: float) -> Tensor:
    """The mean change of p(correct) when each head alone is scaled by 1 + alpha, fp32 [L, H], in row groups."""
    with (
        torch.no_grad(),
        evaluation_mode(subject.model),
        KnockOut(
            subject.model, subject.data, subject.scalars, subject.batch_size, subject.cache_bytes, alpha=alpha,
            measure="probability",
        ) as passes,
    ):  # fmt: skip
        found = passes.run(gradient=False, knock_out=True, progress=subject.progress)
    assert found.changes is not None
    return found.changes[:, 0]


def _check_scales(name: str, values: Sequence[float], sign: int) -> None:
    if not len(values):
        raise ValueError(f"{name}: got no values, expected at least one")
    for value in values:
        check_finite(**{name: value})
        if value * sign <= 0:
            raise ValueError(f"{name}: got {value}, expected numbers {'above' if sign > 0 else 'below'} 0")
