"""The table of all methods that choose heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..._suggestions import did_you_mean
from .fitting import by_path, refitted
from .gates import by_gates
from .head_pursuit import by_pursuit
from .interchange import by_interchange
from .juice import by_gain
from .removal import at_random, by_attribution, by_knock_out
from .sadi import by_difference
from .sami import by_concept
from .subject import Scored

#: Strengths that are tried on the validation examples.
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Method:
    """How heads are scored, and what is done with the chosen ones.

    Args:
        what: what the score is, in a few words.
        source: where it comes from.
        score: maps a Subject, and options, to Scored heads; with `by_number` also the number of heads.
        kind: what the chosen heads do: "scale" h·(1 + β·α), "run-twice" h + β·α·h_first, or "interchange"
            h + β·α·(h_source − h).
        positions: the positions that are edited; None: every token (of "run-twice", of the prompt).
        refits: whether α is learned for the chosen heads.
        by_number: whether the scores belong to a number of heads, so that each number needs a fit of its own.
        fixed: options that the method sets itself.
        strengths: strengths to try by default.
    """

    what: str
    source: str
    score: Callable[..., Scored]
    kind: Literal["scale", "run-twice", "interchange"] = "scale"
    positions: tuple[int, ...] | None = None
    refits: bool = False
    by_number: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    strengths: tuple[float, ...] = STRENGTHS

    @property
    def is_fitted(self) -> bool:
        """Whether the values of α are learned, which is the case for one number of heads only."""
        return self.refits or self.by_number

    @property
    def score_options(self) -> set[str]:
        """The options of `score` that a caller may set."""
        return _keywords(self.score) - set(self.fixed)

    @property
    def refit_options(self) -> set[str]:
        """The options of the refit."""
        return _keywords(refitted) if self.refits else set()


METHODS: dict[str, Method] = {
    "attribution": Method("|gradient| at α = 0", "attribution patching", by_attribution),
    "attribution-refit": Method(
        "|gradient| at α = 0, then a fit", "this package", by_attribution, refits=True, strengths=(1.0,)
    ),
    "knock-out": Method("change when removed", "ablation", by_knock_out),
    "knock-out-refit": Method(
        "change when removed, then a fit", "this package", by_knock_out, refits=True, strengths=(1.0,)
    ),
    "activ-scalar": Method(
        "|α| of a sparse fit", "arXiv 2410.04962; this package's path", by_path, by_number=True, strengths=(1.0,)
    ),
    "juice": Method("gain of p(correct) when scaled", "arXiv 2503.10996", by_gain, kind="run-twice"),
    "juice-once": Method("gain of p(correct) when scaled", "arXiv 2503.10996, run once", by_gain),
    "sami": Method("cosine with a concept", "arXiv 2506.17052", by_concept),
    "sadi": Method("difference of activations", "arXiv 2410.12299", by_difference, positions=(-1,)),
    "head-pursuit": Method("share explained by a concept's tokens", "arXiv 2510.21518", by_pursuit),
    "gates": Method("causal gates", "arXiv 2505.13737", by_gates, fixed={"contrastive": False}),
    "gates-contrastive": Method(
        "contrastive causal gates", "arXiv 2505.13737", by_gates, fixed={"contrastive": True}
    ),
    "interchange": Method(
        "sparse gates of an interchange", "arXiv 2407.03779, 2512.10903", by_interchange, kind="interchange",
        strengths=SHARES,
    ),
    "random": Method("random", "control", at_random),
    "random-refit": Method("random, then a fit", "control", at_random, refits=True, strengths=(1.0,)),
}  # fmt: skip


def checked_method(method: str, options: Mapping[str, Any]) -> Method:
    """The method of this name.

    Raises:
        ValueError: no such method.
        TypeError: an option that it does not have.
    """
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: got {method!r}, expected one of {names}{did_you_mean(str(method), METHODS)}")
    found = METHODS[method]
    known = found.score_options | found.refit_options
    for name in options:
        if name not in known:
            expected = ", ".join(sorted(known)) or "none"
            raise TypeError(
                f"{name}: is no option of the method {method!r}; it has {expected}{did_you_mean(name, known)}"
            )
    return found


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
