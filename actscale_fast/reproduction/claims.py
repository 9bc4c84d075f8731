"""The claims of the paper's abstract, judged by this package's criteria, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .intervals import Interval, Verdict, all_of, interval
from .systems import FEW

#: Minimum flip rate on held-out examples.
EFFECTIVE = 0.85
#: Comparable: at most this much less effective (a share of the examples), and at most this factor more KL.
_WORSE, _MORE_KL = 0.05, 1.5
#: "Much more minimal": at least this factor between the numbers that are not 0. A steering vector has as many numbers
#: as the model is wide, so the number of changed vectors is compared too.
_MORE_MINIMAL = 10

_FORMS = {"per position": ("scalars-by-position", "vectors-by-position"), "per head": ("scalars", "vectors")}
_FORM_NAMES = {"per position": "per site and position, as in the paper", "per head": "per head"}


@dataclass(frozen=True, slots=True)
class Part:
    """One figure that a claim depends on, with its interval and its bound."""

    name: str
    measured: Interval
    bound: str
    verdict: Verdict
    form: str = "{:.2f}"

    def shown(self) -> str:
        return f"{self.name} {self.measured.shown(self.form)} ({self.bound}: {self.verdict})"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the abstract on one task, in one form of the systems."""

    claim: str
    task: str
    kind: str  # which attempts are made while it is open; see `remedies`
    form: str
    criterion: str
    parts: tuple[Part, ...] = field(default=())
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Decided by the intervals: each whole interval on the right side, one on the wrong side, or neither."""
        return all_of([part.verdict for part in self.parts]) if self.parts else "not tested"

    @property
    def found(self) -> str:
        return "; ".join([part.shown() for part in self.parts] + [self.note] * bool(self.note))


def judged(results: Mapping[str, Any], tasks: Sequence[str]) -> list[Claim]:
    """All claims on all tasks.

    Args:
        results: "comparison" {task: {system: [one entry per seed]}}, "transfer" {task: {"lengths": {number: rows}}}.
        tasks: their names.
    """
    claims = []
    for task in tasks:
        systems = results["comparison"][task]
        for kind, (scalars, vectors) in _FORMS.items():
            claims += _beside_vectors(task, kind, tests(systems[scalars]), tests(systems[vectors]))
        claims.append(_few(task, tests(systems["few-scalars"])))
        claims.append(_transferred(task, results["transfer"][task]["lengths"]))
    return claims


def tests(runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The records of the test prompts, one per seed."""
    return [run["test"] for run in runs]


def flips(records: Sequence[Any], *, frozen: bool = False) -> Interval:
    """The share of prompts whose preferred answer is the one steered to, averaged over both directions."""
    return paired(
        {"x": [record["frozen"] for record in records] if frozen else records},
        ("correct", "wrong"), lambda x: (x["x.correct"] + x["x.wrong"]) / 2,
    )  # fmt: skip


def fewer_of_both(records: Sequence[Any]) -> Interval:
    """The smaller of the two flip rates."""
    import numpy as np

    return paired({"x": records}, ("correct", "wrong"), lambda x: np.minimum(x["x.correct"], x["x.wrong"]))


def paired(
    records: Mapping[str, Sequence[Any]], names: Sequence[str], statistic: Callable[[Mapping[str, Any]], Any]
) -> Interval:
    """The interval of a statistic of several systems' figures on the same prompts.

    Args:
        records: records by the system's name, one per seed, for the same seeds and prompts.
        names: the figures that the statistic needs; it gets their means as "system.figure".
    """
    runs = []
    for of_seed in zip(*records.values(), strict=True):
        named = zip(records, of_seed, strict=True)
        runs.append({f"{system}.{name}": record[name] for system, record in named for name in names})
    return interval(runs, statistic)


def _counted(
    records: Mapping[str, Sequence[Any]], name: str, statistic: Callable[[Mapping[str, Any]], Any]
) -> Interval:
    """As `paired`, for one number per seed."""
    runs = [
        {system: [float(record[name])] for system, record in zip(records, of_seed, strict=True)}
        for of_seed in zip(*records.values(), strict=True)
    ]
    return interval(runs, statistic)


def _beside_vectors(task: str, kind: str, scalars: list[Any], vectors: list[Any]) -> list[Claim]:
    """Compare scalars and vectors that were fitted with equally many steps."""
    both = {"s": scalars, "v": vectors}
    own, frozen = flips(scalars), flips(scalars, frozen=True)
    difference = paired(
        both, ("correct", "wrong"),
        lambda x: (x["s.correct"] + x["s.wrong"] - x["v.correct"] - x["v.wrong"]) / 2,
    )  # fmt: skip
    kl = paired(both, ("kl",), lambda x: x["s.kl"] / x["v.kl"].clip(1e-9))
    numbers = _counted(both, "n_active", lambda x: x["v"] / x["s"].clip(1e-9))
    changed = _counted(both, "n_places", lambda x: x["s"] - x["v"])
    n_active = [sum(record["n_active"] for record in records) / len(records) for records in (scalars, vectors)]
    effective = (
        Part("flips", own, f"at least {EFFECTIVE}", own.at_least(EFFECTIVE)),
        Part("flips less those of vectors", difference, f"at least −{_WORSE}", difference.at_least(-_WORSE), "{:+.2f}"),
    )
    form = _FORM_NAMES[kind]
    return [
        Claim(
            "Scalars are as effective and as faithful as steering vectors", task, kind, form,
            f"flips at least {EFFECTIVE} and at most {_WORSE} fewer, KL at most {_MORE_KL} times that of SteerVec",
            (*effective, Part("KL as a multiple of that of vectors", kl, f"at most {_MORE_KL}", kl.at_most(_MORE_KL))),
            f"frozen model {frozen.value:.2f}",
        ),
        Claim(
            "They are much more minimal", task, "", form,
            f"effective; at most a {_MORE_MINIMAL}th of the numbers that are not 0, and no more vectors changed",
            (
                *effective,
                Part(
                    "numbers of SteerVec per scalar", numbers, f"at least {_MORE_MINIMAL}",
                    numbers.at_least(_MORE_MINIMAL) if n_active[0] else "not held", "{:.0f}",
                ),
                Part("changed vectors less those of SteerVec", changed, "at most 0", changed.at_most(0), "{:+.0f}"),
            ),
            f"{n_active[0]:.0f} numbers against {n_active[1]:.0f}",
        ),
    ]  # fmt: skip


def _few(task: str, records: list[Any]) -> Claim:
    least = fewer_of_both(records)
    n_active, n_heads = (
        sum(record[name] for record in records) / len(records) for name in ("n_active", "n_parameters")
    )
    return Claim(
        "It is enough to scale a few activation vectors", task, "few", "per head, refit",
        f"at most {FEW:.0%} of the heads flip {EFFECTIVE:.0%} of held-out answers in each direction",
        (Part("the smaller of both flip rates", least, f"at least {EFFECTIVE}", least.at_least(EFFECTIVE)),),
        f"{n_active:.0f} of {n_heads:.0f} heads",
    )  # fmt: skip


def _transferred(task: str, lengths: Mapping[str, Any]) -> Claim:
    rows = [row["probes"] for _, row in sorted(lengths.items(), key=lambda item: int(item[0])) if row["probes"]["runs"]]
    claim = "DynScalar generalises to prompts of other lengths"
    criterion = f"on the longest prompts flips {EFFECTIVE:.0%}, and keeps half of the gain at the training length"
    if len(rows) < 2:
        return Claim(claim, task, "", "per head", criterion, note="longer prompts exceed the model's context")
    first, last = rows[0], rows[-1]
    end = flips(last["runs"])
    columns = {
        "a": first["runs"], "b": last["runs"], "c": [run["frozen"] for run in first["runs"]],
        "d": [run["frozen"] for run in last["runs"]],
    }  # fmt: skip

    def kept(x: Mapping[str, Any]) -> Any:
        a, b, c, d = ((x[f"{name}.correct"] + x[f"{name}.wrong"]) / 2 for name in "abcd")
        return (b - d) - (a - c) / 2

    gain = paired(columns, ("correct", "wrong"), kept)
    start = flips(first["runs"])
    return Claim(
        claim, task, "", "per head", criterion,
        (
            Part("flips on the longest", end, f"at least {EFFECTIVE}", end.at_least(EFFECTIVE)),
            Part("gain there less half of the gain before", gain, "at least 0", gain.at_least(0), "{:+.2f}"),
        ),
        f"{start.value:.2f} at {first['lengths'][0]} tokens, {end.value:.2f} at up to {last['lengths'][1]}",
    )  # fmt: skip
