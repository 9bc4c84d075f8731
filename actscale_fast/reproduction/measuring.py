"""The figures of an intervention, and baseline interventions that are not learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..interventions import ActivScalar, Intervention
from ..learning import Attribution, Evaluation

if TYPE_CHECKING:
    from ..architectures.location import Location

#: The figures of an evaluation that the report shows.
FIGURES = ("flip_to_correct", "flip_to_wrong", "kl", "top1", "logit_difference", "logit_difference_inverted")


def places(intervention: Intervention) -> list[tuple[str, int, int, int]]:
    """The activation vectors that an intervention changes, (site, layer, slot, head): any parameter is not 0."""
    found = []
    for single in intervention.singles:
        location: Location = single.location
        used = torch.zeros(len(location.layers), 1, location.n_heads, dtype=torch.bool, device="cpu")
        for value in single.parameters():
            used = used | value.detach().cpu().reshape(*value.shape[:3], -1).ne(0).any(-1)
        found += [(location.site, location.layers[layer], slot, head) for layer, slot, head in used.nonzero().tolist()]
    return found


def figures(evaluation: Evaluation, intervention: Intervention) -> dict[str, Any]:
    """The figures of an evaluation and its baseline, and how much of the model the intervention changes."""
    frozen = evaluation.baseline
    assert frozen is not None
    return {
        **{name: getattr(evaluation, name) for name in FIGURES},
        "baseline": {name: getattr(frozen, name) for name in FIGURES},
        "n_examples": evaluation.n_examples,
        "n_active": evaluation.n_active,
        "n_parameters": evaluation.n_scalars,
        "n_places": len(places(intervention)),
        "l1": evaluation.l1,
    }


def shuffled(scalars: ActivScalar, seed: int) -> ActivScalar:
    """The same values at random heads, with the same ℓ1 norm and number."""
    order = torch.randperm(scalars.alpha.numel(), generator=torch.Generator().manual_seed(seed), device="cpu")
    return _with_values(scalars, scalars.alpha.detach().cpu().flatten()[order])


def by_attribution(scalars: ActivScalar, attribution: Attribution) -> ActivScalar:
    """The largest entries of the gradient at 0, scaled to the same number and ℓ1 norm."""
    scores = attribution.scores.flatten()
    kept = torch.zeros_like(scores)
    top = scores.abs().topk(max(scalars.n_active, 1)).indices
    kept[top] = scores[top]
    size = float(kept.abs().sum())
    return _with_values(scalars, kept * (scalars.l1 / size) if size > 0 else kept)


def jaccard(sets: Sequence[set[Any]]) -> list[list[float]]:
    """The overlap |A ∩ B| / |A ∪ B| of every pair; 1 for two empty sets."""
    return [[len(a & b) / len(a | b) if a | b else 1.0 for b in sets] for a in sets]


def _with_values(scalars: ActivScalar, values: Tensor) -> ActivScalar:
    other = ActivScalar(scalars.location, device=scalars.device)
    with torch.no_grad():
        other.alpha.copy_(values.view(other.alpha.shape))
    return other
