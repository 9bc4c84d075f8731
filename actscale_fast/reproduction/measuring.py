"""What is kept of a measurement: figures of each prompt, and how much of the model an intervention changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..interventions import ActivScalar, Intervention
from ..learning import Attribution
from ..learning.evaluate import measure_all
from ..learning.prompt_statistics import Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..architectures.location import Location

#: Figures of one prompt, by the name under which they are kept. "Correct" is under β = +1, "wrong" under β = −1.
PER_PROMPT = ("correct", "wrong", "top_correct", "top_wrong", "kl", "kept")
#: How much an intervention changes: active parameters, all parameters, changed activation vectors, ℓ1 norm.
COUNTS = ("n_active", "n_parameters", "n_places", "l1")


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Any, interventions: Sequence[Intervention]
) -> list[dict[str, Any]]:
    """One record per intervention: `PER_PROMPT` as lists, `COUNTS`, and under "frozen" the frozen model's lists."""
    found = measure_all(model, tokenizer, examples, interventions)
    return [
        _lists(steered)
        | {
            "n_active": one.n_active,
            "n_parameters": one.n_parameters,
            "n_places": len(places(one)),
            "l1": round(one.l1, 4),
            "frozen": _lists(frozen),
        }
        for one, (steered, frozen) in zip(interventions, found, strict=True)
    ]


def _lists(measured: Measured) -> dict[str, list[float]]:
    columns = {
        "correct": (measured.plus > 0).int(),
        "wrong": (measured.minus < 0).int(),
        "top_correct": measured.top_correct.int(),
        "top_wrong": measured.top_wrong.int(),
        "kl": (measured.kl_correct + measured.kl_wrong) / 2,
        "kept": (measured.kept_correct + measured.kept_wrong) / 2,
    }
    return {name: [round(value, 4) for value in column.tolist()] for name, column in columns.items()}


def places(intervention: Intervention) -> list[tuple[str, int, int, int]]:
    """The activation vectors that an intervention changes, (site, layer, slot, head): any parameter is not 0.

    A site whose module was named by its path is "site (path)".
    """
    found = []
    for single in intervention.singles:
        location: Location = single.location
        used = torch.zeros(len(location.layers), 1, location.n_heads, dtype=torch.bool, device="cpu")
        for value in single.parameters():
            used = used | value.detach().cpu().reshape(*value.shape[:3], -1).ne(0).any(-1)
        site = location.site_name
        found += [(site, location.layers[layer], slot, head) for layer, slot, head in used.nonzero().tolist()]
    return found


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
