"""The claims of the paper's abstract, each with a criterion that was fixed beforehand, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

#: Both directions on held-out examples.
_EFFECTIVE = 0.85
#: How much less effective still counts as comparable (a share of the examples), and how much more KL (a factor).
_WORSE, _MORE_KL = 0.05, 1.5
#: "A few": this share of the vectors that could be scaled.
_FEW = 0.2


@dataclass(frozen=True, slots=True)
class Claim:
    """What the abstract says, when it is taken to hold here, and what was found."""

    claim: str
    criterion: str
    found: str
    held: bool


def judged(results: dict[str, Any], tasks: Sequence[str]) -> list[Claim]:
    """All claims on all tasks.

    Args:
        results: of a run: "comparison" {task: {system: [a seed each]}}, "path" {task: rows}, "transfer" {task: rows}.
        tasks: their names.
    """
    claims = []
    for task in tasks:
        systems = results["comparison"][task]
        for scalars, vectors, where in (
            ("scalars-by-position", "vectors-by-position", "per site and position, as in the paper"),
            ("scalars", "vectors", "per head"),
        ):
            if scalars in systems and vectors in systems:
                claims += _beside_vectors(task, where, systems[scalars], systems[vectors])
        claims.append(_few(task, results["path"][task]))
        claims.append(_transferred(task, results["transfer"][task]))
    return claims


def _beside_vectors(task: str, where: str, scalars: list[Any], vectors: list[Any]) -> list[Claim]:
    one, other = ({key: _mean(runs, key) for key in ("effect", "kl", "n_active")} for runs in (scalars, vectors))
    effective = one["effect"] >= other["effect"] - _WORSE
    faithful = one["kl"] <= _MORE_KL * other["kl"]
    found = f"{task}, {where}: flips {one['effect']:.2f} against {other['effect']:.2f}, "
    return [
        Claim(
            "Scalars are as effective and as faithful as steering vectors",
            f"flips at most {_WORSE} fewer, KL at most {_MORE_KL} times that of SteerVec",
            f"{found}KL {one['kl']:.2f} against {other['kl']:.2f}",
            effective and faithful,
        ),
        Claim(
            "They are much more minimal",
            "a tenth of the parameters that are not 0, or fewer",
            f"{task}, {where}: {one['n_active']:.0f} against {other['n_active']:.0f}",
            10 * one["n_active"] <= other["n_active"],
        ),
    ]


def _few(task: str, path: list[Any]) -> Claim:
    good = [row for row in path if min(row["flip_to_correct"], row["flip_to_wrong"]) >= _EFFECTIVE]
    criterion = f"at most {_FEW:.0%} of them flip {_EFFECTIVE:.0%} of held-out answers in each direction"
    if not good:
        best = max(path, key=lambda row: min(row["flip_to_correct"], row["flip_to_wrong"]))
        reached = f"{best['flip_to_correct']:.2f} and {best['flip_to_wrong']:.2f} with {best['n_active']}"
        return Claim(
            "It is enough to scale a few activation vectors", criterion, f"{task}: no more than {reached}", False
        )
    fewest = min(good, key=lambda row: row["n_active"])
    share = fewest["n_active"] / fewest["n_parameters"]
    found = (
        f"{task}: {fewest['n_active']} of {fewest['n_parameters']} heads ({share:.0%}) flip "
        f"{fewest['flip_to_correct']:.2f} and {fewest['flip_to_wrong']:.2f}"
    )
    return Claim("It is enough to scale a few activation vectors", criterion, found, share <= _FEW)


def _transferred(task: str, rows: list[Any]) -> Claim:
    first, last = rows[0], rows[-1]
    start, end = (_mean_of(row["systems"]["probes"]) for row in (first, last))
    frozen = fmean(effect(run["baseline"]) for run in last["systems"]["probes"])
    return Claim(
        "DynScalar generalises to prompts of other lengths",
        f"on the longest prompts flips {_EFFECTIVE:.0%}, and half of what was gained at the training's length, or more",
        f"{task}: flips {start:.2f} at {first['lengths'][0]} tokens, {end:.2f} at {last['lengths'][1]} "
        f"(frozen {frozen:.2f})",
        end >= _EFFECTIVE and end - frozen >= (start - frozen) / 2,
    )


def _mean(runs: list[Any], key: str) -> float:
    if key == "effect":
        return _mean_of([run["test"] for run in runs])
    return fmean(run["test"][key] for run in runs)


def _mean_of(found: Sequence[Any]) -> float:
    return fmean(map(effect, found))


def effect(figures: Any) -> float:
    """The mean of both flip rates."""
    return fmean((figures["flip_to_correct"], figures["flip_to_wrong"]))
