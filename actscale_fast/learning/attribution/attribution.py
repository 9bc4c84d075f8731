"""Attribution: each head's contribution to an answer, predicted by one gradient and measured by knock-outs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_counts, check_not_negative
from ..._tables import Readable
from ...architectures.location import Location
from ...architectures.site_check import skipped
from ...interventions import ActivScalar
from ...modules.evaluation_mode import evaluation_mode
from ...patching.patch import patch
from ...tasks.loading import ExampleSource
from ..arguments import checked_location, checked_objective, refuse_inference_mode, refuse_tokenless
from ..broken_connections import explained_where_sharded
from ..encoded_examples import EncodedExamples
from ..engine import Engine, FitRequest, check_gradient
from ..execution import CACHE_BYTES, Execution
from ..objective import Objective
from .knock_out import KnockOut

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Number of heads that an agreement counts as the top; at most a quarter of all.
_TOP = 10


class Agreement(NamedTuple):
    """How well the gradient's prediction, −score, agrees with the knock-out; NaN if one of them is constant."""

    pearson: float
    spearman: float
    overlap: float  # share of the n_top largest by magnitude that they have in common
    n_top: int


class Place(NamedTuple):
    """One scalar: its place, its score and its knock-out."""

    layer: int
    slot: int  # index among the location's positions; 0 if all tokens share one
    head: int  # 0 for a whole site
    score: float
    knock_out: float | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Attribution(Readable):
    """The result of `attribution`. L chosen layers, P position slots, H heads (1 at a whole site)."""

    #: fp32 [L, P, H]: the derivative at α = 0 of the mean logit difference (or of the given objective).
    #: Removing the head, β·α = −1, is predicted to change that mean by −score.
    scores: Tensor = field(repr=False)
    #: fp32 [L, P, H]: the change of the mean logit difference if only this head is removed; None: not measured.
    knock_out: Tensor | None = field(repr=False)
    location: Location
    n_examples: int
    #: The frozen model's mean z[c] − z[w]; where an answer has several tokens, log p(c) − log p(w).
    logit_difference: float
    #: The objective whose gradient the scores are; None: the mean logit difference.
    objective: Objective | None = None

    @property
    def n_top(self) -> int:
        """Number of places that count as the top."""
        return min(_TOP, max(self.scores.numel() // 4, 1))

    @property
    def agreement(self) -> Agreement | None:
        """The agreement of −scores with the knock-out; None without a knock-out or with an objective."""
        if self.knock_out is None or self.objective is not None:
            return None
        predicted, measured = -self.scores.flatten().double(), self.knock_out.flatten().double()
        n_top = self.n_top
        tops = [set(values.abs().topk(n_top).indices.tolist()) for values in (predicted, measured)]
        return Agreement(
            _correlation(predicted, measured),
            _correlation(_ranks(predicted), _ranks(measured)),
            len(tops[0] & tops[1]) / n_top,
            n_top,
        )

    def top(self, k: int = _TOP) -> list[Place]:
        """The k places with the largest scores by magnitude, largest first."""
        check_counts(k=k)
        order = self.scores.abs().flatten().argsort(descending=True, stable=True)[:k].tolist()
        _, n_slots, n_heads = self.scores.shape
        places = []
        for flat in order:
            layer, rest = divmod(flat, n_slots * n_heads)
            slot, head = divmod(rest, n_heads)
            score = float(self.scores[layer, slot, head])
            measured = None if self.knock_out is None else float(self.knock_out[layer, slot, head])
            places.append(Place(self.location.layers[layer], slot, head, score, measured))
        return places

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the changes when each of the places with the largest scores is removed."""
        where, measured = self.location, self.knock_out is not None
        shown = {"layer": True, "position": where.positions is not None, "head": where.site == "head"}
        columns = [name for name, is_shown in shown.items() if is_shown]
        slots = [*map(str, where.positions or ("",)), *(["generated"] * where.generated)]
        rows = []
        for place in self.top():
            cells = {"layer": str(place.layer), "position": slots[place.slot], "head": str(place.head)}
            figures = [-place.score, *([] if place.knock_out is None else [place.knock_out])]
            rows.append([cells[name] for name in columns] + [f"{figure:+.3f}" for figure in figures])
        return [*columns, "predicted", *(["measured"] if measured else [])], rows

    def _heading(self) -> str:
        return f"Attribution: removing one place at a time ({self.n_examples} prompts)"

    def _notes(self) -> list[str]:
        what = "the objective" if self.objective is not None else "the mean logit difference z[c] − z[w]"
        notes = [f"predicted change of {what}; z[c] − z[w] is {self.logit_difference:+.2f} on average"]
        found = self.agreement
        if found is not None:
            notes.append(
                f"agreement over {self.scores.numel()}: Pearson {found.pearson:.2f}, Spearman {found.spearman:.2f}, "
                f"{round(found.overlap * found.n_top)} of the {found.n_top} largest are the same"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON; undefined correlations are None."""
        agreement = None if self.agreement is None else self.agreement._asdict()
        if agreement is not None:
            agreement = {name: value if math.isfinite(value) else None for name, value in agreement.items()}
        return {
            "n_examples": self.n_examples,
            "logit_difference": self.logit_difference,
            "objective": None if self.objective is None else asdict(self.objective),
            "agreement": agreement,
            "location": self.location.to_dict(),
            "scores": self.scores.tolist(),
            "knock_out": None if self.knock_out is None else self.knock_out.tolist(),
        }

    def heatmap(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the prediction and the measurement; see `plots.attribution`."""
        from ...plots import attribution as draw

        return draw(self, path, **options)


def attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    *,
    site: str = "head",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    intervention: ActivScalar | None = None,
    objective: Objective | None = None,
    knock_out: bool = True,
    batch_size: int = 32,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = True,
) -> Attribution:
    """Find out what each head (or whole site) contributes to the examples' answers.

    With y = h·(1 + β·α) the gradient of a metric at α = 0 is dL/dα = β·⟨h, dL/dy⟩, summed over tokens: attribution
    patching towards zero activations, for all heads at once, from one forward and one backward pass. The metric is the
    mean over examples of the logit difference z[c] − z[w]. Where an answer has several tokens it is the difference of
    the answers' log-probabilities, log p(c) − log p(w), and their tokens are steered as generated tokens are.

    Sign: a score is the derivative of that mean with respect to α at β = 1. A head with a positive score favours the
    correct answer: amplifying it raises the difference, and removing it (β·α = −1) is predicted to change it by −score.
    The knock-out removes one head at a time and measures that change: all heads of a layer run as row groups of the
    same passes, from the frozen model's hidden states at that layer.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer. The model is left unchanged, and runs
            uncompiled even if it is compiled.
        examples: prompts with their two answers, as for `fit`.
        site, layers, positions: as for `ActivScalar.for_model`.
        intervention: takes the place of these three by its location; its values are neither read nor changed.
        objective: take the gradient of its E + λ_F·F at α = 0 as scores, which is that of the first step of `fit` on
            all examples. The knock-out still measures the logit difference, so no agreement is computed.
        knock_out: whether to measure too, which runs heads × prompts rows through the layers above each head.
        batch_size: the largest number of prompts in one pass of the gradient.
        cache_bytes: memory for the frozen model's hidden states, which limits the prompts that run at a time.
        progress: show a progress bar.

    Returns:
        Attribution, with its tensors on the CPU.

    Raises:
        TypeError, ValueError: bad arguments or examples (see `EncodedExamples`), an intervention of another model, or
            one that is passed together with a site, layers or positions.
        RuntimeError: under torch.inference_mode(), where gradients cannot be enabled.

    Example:
        >>> result = af.attribution(model, tokenizer, examples)
        >>> print(result.agreement, result.top(5))
        >>> result.heatmap("attribution.png")
    """
    check_counts(batch_size=batch_size)
    check_not_negative(cache_bytes=cache_bytes)
    refuse_inference_mode("attribution")
    if intervention is None:
        scalars = ActivScalar.for_model(model, site=site, layers=layers, positions=positions)  # type: ignore[arg-type]
    else:
        if (site, layers, positions) != ("head", None, None):
            raise ValueError("intervention: given together with site, layers or positions, expected one or the other")
        scalars = _at_rest(intervention)
    data = EncodedExamples(examples, tokenizer, model, scalars.location.paths)
    refuse_tokenless(scalars, data)
    patch(model, scalars).remove()  # refuses another model's place before any work; moves to this model's device
    objective_scores: Tensor | None = None
    with explained_where_sharded(model), torch.enable_grad():
        if objective is not None:
            accumulate = -(-len(data) // batch_size)
            execution = Execution(accumulate, cache_bytes)
            with Engine(model, data, scalars, [checked_objective(objective)], execution) as engine:
                _, (objective_scores,) = engine.gradients([FitRequest(range(len(data)), objective)])
        elif not skipped():
            check_gradient(model, data, scalars)
        with evaluation_mode(model), KnockOut(model, data, scalars, batch_size, cache_bytes) as passes:
            found = passes.run(gradient=objective is None, knock_out=knock_out, progress=progress)
    scores = found.gradient if objective_scores is None else objective_scores
    assert scores is not None
    return Attribution(
        scores.detach().float().cpu(), found.changes, scalars.location, len(data), found.difference, objective
    )


def _at_rest(intervention: Any) -> ActivScalar:
    """New scalars, all 0, at the intervention's location."""
    if not isinstance(intervention, ActivScalar):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an ActivScalar or None")
    return ActivScalar(checked_location(intervention), device=intervention.device)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors; NaN if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks in ascending order from 1; equal values share their mean rank."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[where]
