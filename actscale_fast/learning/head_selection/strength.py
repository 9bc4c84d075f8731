"""The strength of a selection, chosen on validation examples with a bound on side effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from ..._checks import check_finite
from ...interventions import Intervention
from ...tasks.loading import ExampleSource, examples_from
from ..evaluate import evaluate, evaluate_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Direction = Literal["both", "correct", "wrong"]
_FIGURES = (
    "n_examples", "flip_to_correct", "flip_to_wrong", "logit_difference", "logit_difference_inverted", "kl",
    "kl_correct", "kl_wrong",
)  # fmt: skip
_FLIPS = {"correct": ("flip_to_correct",), "wrong": ("flip_to_wrong",), "both": ("flip_to_correct", "flip_to_wrong")}
_KL = {"correct": "kl_correct", "wrong": "kl_wrong", "both": "kl"}


class NoStrengthAllowedError(ValueError):
    """No strength that was tried stays within the bound on side effects."""


def strengths_measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    made: Callable[[float], Intervention],
    strengths: Sequence[float],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[dict[str, float]]:
    """One record per strength: the strength, and figures of `evaluate` on these examples.

    Args:
        made: maps a strength to the intervention.
        strengths: see `check_choice`.
    """
    examples = examples_from(examples)
    interventions = [made(float(strength)) for strength in strengths]
    # Those that read stored activations are measured one by one: each keeps as many of them as there are examples.
    if any(part.needs_source for part in interventions[0].singles):
        evaluations = [
            evaluate(model, tokenizer, examples, one, batch_size=batch_size, progress=progress) for one in interventions
        ]
    else:
        evaluations = evaluate_all(model, tokenizer, examples, interventions, batch_size=batch_size, progress=progress)
    return [
        {"strength": float(strength)} | {name: float(getattr(evaluation, name)) for name in _FIGURES}
        for strength, evaluation in zip(strengths, evaluations, strict=True)
    ]


def check_choice(strengths: Sequence[float], max_kl: float | None, direction: str) -> None:
    """Raise a ValueError for arguments that no strength can be chosen by; see `HeadSelection.choose_strength`."""
    if not len(strengths):
        raise ValueError("strengths: got none, expected at least one number")
    for strength in strengths:
        check_finite(strengths=strength)
    if direction not in _FLIPS:
        raise ValueError(f"direction: got {direction!r}, expected 'both', 'correct' or 'wrong'")
    if max_kl is not None:
        check_finite(max_kl=max_kl)
        if max_kl < 0:
            raise ValueError(f"max_kl: got {max_kl}, expected a number >= 0")


def chosen_strength(records: Sequence[dict[str, float]], max_kl: float | None, direction: Direction) -> float:
    """The strength with the most flips among those within the bound; of equal ones the smallest.

    Args:
        records: from `strengths_measured`.
        max_kl, direction: as in `HeadSelection.choose_strength`.

    Raises:
        NoStrengthAllowedError: no strength is within the bound.
    """
    kl = _KL[direction]
    allowed = [record for record in records if record[kl] <= (math.inf if max_kl is None else max_kl)]
    if not allowed:
        least = min(records, key=lambda record: record[kl])
        raise NoStrengthAllowedError(
            f"max_kl: got {max_kl}, but the smallest KL divergence of the strengths tried is {least[kl]:.3g} (at "
            f"{least['strength']:g}); allow more, try smaller strengths, or choose fewer heads"
        )
    flips = _FLIPS[direction]
    best = max(allowed, key=lambda record: (sum(record[name] for name in flips), -abs(record["strength"])))
    return best["strength"]
