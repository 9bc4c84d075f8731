"""The claims of the paper's abstract, judged by this package's criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

#: Minimum flip rate on held-out examples.
EFFECTIVE = 0.85
#: Comparable: at most this much less effective (a share of the examples), and at most this factor more KL.
_WORSE, _MORE_KL = 0.05, 1.5
#: "A few": at most this share of the vectors that could be scaled.
_FEW = 0.2
#: "Much more minimal": at least this factor between the numbers that are not 0. A steering vector has as many numbers
#: as the model is wide, so the number of changed vectors is compared too.
_MORE_MINIMAL = 10


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the abstract, the criterion for it, and what was found."""

    claim: str
    criterion: str
    found: str
    held: bool | None  # None: not testable


def judged(results: dict[str, Any], tasks: Sequence[str]) -> list[Claim]:
    """All claims on all tasks.

    Args:
        results: "comparison" {task: {system: [one entry per seed]}}, "path" {task: rows}, "transfer" {task: rows}.
        tasks: their names.
    """
    claims = []
    for task in tasks:
        systems = results["comparison"][task]
        claims += _beside_vectors(task, systems["scalars-by-position"], systems["vectors-by-position"])
        claims.append(_few(task, results["path"][task]))
        claims.append(_transferred(task, results["transfer"][task]))
    return claims


def effect(figures: Any) -> float:
    """The mean of both flip rates."""
    return fmean((figures["flip_to_correct"], figures["flip_to_wrong"]))


def _beside_vectors(task: str, scalars: list[Any], vectors: list[Any]) -> list[Claim]:
    """Compare scalars and vectors per site and position, as in the paper, with equally many steps."""
    one, other = ([run["test"] for run in runs] for runs in (scalars, vectors))
    flips, theirs = ([effect(run) for run in runs] for runs in (one, other))
    kl, their_kl = (_mean(runs, "kl") for runs in (one, other))
    active, their_active = (_mean(runs, "n_active") for runs in (one, other))
    places, their_places = (_mean(runs, "n_places") for runs in (one, other))
    effective = fmean(flips) >= max(fmean(theirs) - _WORSE, EFFECTIVE)
    frozen = fmean(effect(run["baseline"]) for run in one)
    return [
        Claim(
            "Scalars are as effective and as faithful as steering vectors",
            f"flips at least {EFFECTIVE} and at most {_WORSE} fewer, KL at most {_MORE_KL} times that of SteerVec",
            f"{task}: flips {_spread(flips)} against {_spread(theirs)} (frozen {frozen:.2f}), KL {kl:.2f} against "
            f"{their_kl:.2f}",
            effective and kl <= _MORE_KL * their_kl,
        ),
        Claim(
            "They are much more minimal",
            f"effective; at most a {_MORE_MINIMAL}th of the numbers that are not 0, and no more vectors changed",
            f"{task}: {active:.0f} numbers against {their_active:.0f}, {places:.0f} vectors against {their_places:.0f}",
            effective and 0 < _MORE_MINIMAL * active <= their_active and places <= their_places,
        ),
    ]


def _few(task: str, path: list[Any]) -> Claim:
    claim = "It is enough to scale a few activation vectors"
    criterion = f"at most {_FEW:.0%} of the heads flip {EFFECTIVE:.0%} of held-out answers in each direction"
    good = [row for row in path if min(row["flip_to_correct"], row["flip_to_wrong"]) >= EFFECTIVE]
    if not good:
        best = max(path, key=lambda row: min(row["flip_to_correct"], row["flip_to_wrong"]))
        reached = f"{best['flip_to_correct']:.2f} and {best['flip_to_wrong']:.2f} with {best['n_active']}"
        return Claim(claim, criterion, f"{task}: no more than {reached}", False)
    fewest = min(good, key=lambda row: row["n_active"])
    share = fewest["n_active"] / fewest["n_parameters"]
    found = (
        f"{task}: {fewest['n_active']} of {fewest['n_parameters']} heads ({share:.0%}) flip "
        f"{fewest['flip_to_correct']:.2f} and {fewest['flip_to_wrong']:.2f}"
    )
    return Claim(claim, criterion, found, share <= _FEW)


def _transferred(task: str, rows: list[Any]) -> Claim:
    claim = "DynScalar generalises to prompts of other lengths"
    criterion = f"on the longest prompts flips {EFFECTIVE:.0%}, and keeps half of the gain at the training length"
    first, last = rows[0], rows[-1]
    if len(rows) < 2:
        return Claim(claim, criterion, f"{task}: longer prompts exceed the model's context", None)
    start, end = ([effect(run) for run in row["systems"]["probes"]] for row in (first, last))
    before, frozen = (fmean(effect(run["baseline"]) for run in row["systems"]["probes"]) for row in (first, last))
    return Claim(
        claim,
        criterion,
        f"{task}: flips {_spread(start)} at {first['lengths'][0]} tokens (frozen {before:.2f}), {_spread(end)} at "
        f"{last['lengths'][1]} ({frozen:.2f})",
        fmean(end) >= EFFECTIVE and fmean(end) - frozen >= (fmean(start) - before) / 2,
    )


def _mean(runs: list[Any], key: str) -> float:
    return fmean(run[key] for run in runs)


def _spread(values: Sequence[float]) -> str:
    """The mean, and the range if the seeds differ."""
    low, high = min(values), max(values)
    return f"{fmean(values):.2f}" + ("" if f"{low:.2f}" == f"{high:.2f}" else f" ({low:.2f}–{high:.2f})")
