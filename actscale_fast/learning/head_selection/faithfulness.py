"""Necessity and sufficiency of chosen heads, by ablation and by interchange.

With m the mean logit difference log p(correct) − log p(wrong), M the whole model, K the chosen heads and ∅ the model
with every head replaced,

    necessity   = (m(M) − m(M∖K)) / (m(M) − m(∅))      K is replaced, all other heads act
    sufficiency = (m(K) − m(∅)) / (m(M) − m(∅))        only K acts, all other heads are replaced

A head is replaced by zeros (ablation, knock-out), or by its activations on the example's source at the same tokens
(interchange, activation patching). An ablation misses what other heads make up for and takes the model far from what it
was trained on; an interchange leaves every activation one that occurs, and asks for what differs between prompt and
source. Replacing K in a run of the prompt is "noising", and tests whether K is needed; keeping K alone tests whether it
is enough (arXiv 2404.15255; knock-outs: arXiv 2211.00593). Sufficiency is the faithfulness of the circuit K in
arXiv 2504.13151. Our reading: heads alone are replaced, so that MLPs belong to every circuit, ∅ included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._checks import check_counts, check_not_negative, is_integer
from ..._json import write_json
from ..._tables import Readable
from ...tasks.loading import ExampleSource, examples_from
from ..bootstrap import intervals
from .circuits import Ablation, check_ablation, circuit_differences
from .selection import HeadSelection
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class FaithfulnessRow:
    """One circuit under one ablation."""

    ablation: str
    circuit: str  #: which heads act
    logit_difference: float
    correct: float  #: share of prompts with the correct answer above the wrong one
    share: float | None  #: the necessity or sufficiency; None: of the whole model and of no head
    #: 95 % bootstrap intervals over the prompts; of the whole model also that of the "effect", m(M) − m(∅)
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadFaithfulness(Readable):
    """The result of `head_faithfulness`."""

    rows: list[FaithfulnessRow] = field(repr=False)
    k: int  #: number of chosen heads
    n_heads: int  #: number of heads in the layers that they were chosen from
    n_random: int  #: number of random choices that each row of random heads is the mean of
    n_examples: int

    def necessity(self, ablation: Ablation = "zero") -> float:
        """The share of the effect that is lost without the chosen heads; see `has_effect`."""
        return self._share(ablation, _WITHOUT)

    def sufficiency(self, ablation: Ablation = "zero") -> float:
        """The share of the effect that the chosen heads alone keep; see `has_effect`."""
        return self._share(ablation, _ONLY)

    def has_effect(self, ablation: Ablation = "zero") -> bool:
        """Whether the 95 % interval of the effect m(M) − m(∅) excludes 0; else its shares have no meaning."""
        low, high = self._whole(ablation).intervals["effect"]
        return low > 0 or high < 0

    def _whole(self, ablation: str) -> FaithfulnessRow:
        for row in self.rows:
            if (row.ablation, row.circuit) == (ablation, _ALL):
                return row
        raise ValueError(f"ablation: got {ablation!r}, which was not measured")

    def _share(self, ablation: str, circuit: str) -> float:
        for row in self.rows:
            if (row.ablation, row.circuit) == (ablation, circuit) and row.share is not None:
                return row.share
        raise ValueError(f"ablation: got {ablation!r}, which was not measured")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text; brackets are 95 % intervals over the prompts.

        Shares of an effect whose own interval includes 0 are not shown.
        """
        rows = []
        for row in self.rows:
            share = ""
            if row.share is not None:
                known = self.has_effect(row.ablation)  # type: ignore[arg-type]
                share = f"{_MEASURES[row.circuit]} {_with_ends(row, 'share', '{:.2f}') if known else 'not known'}"
            difference = _with_ends(row, "logit_difference", "{:+.2f}")
            rows.append([row.ablation, row.circuit, difference, f"{row.correct:.2f}", share])
        return ["replaced by", "heads that act", "logit difference", "correct above wrong", "share of the effect"], rows

    def _heading(self) -> str:
        return f"Faithfulness of {self.k} of {self.n_heads} heads ({self.n_examples} prompts)"

    def _notes(self) -> list[str]:
        notes = [f"random heads: the mean of {self.n_random} choices of {self.k}"] if self.n_random else []
        for ablation in dict.fromkeys(row.ablation for row in self.rows):
            if not self.has_effect(ablation):  # type: ignore[arg-type]
                low, high = self._whole(ablation).intervals["effect"]
                notes.append(
                    f"{ablation}: the effect of all heads may be 0 (from {low:+.2f} to {high:+.2f}), so that shares of "
                    "it are not known"
                )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, atomically."""
        write_json(path, self.to_dict())


_ALL, _NONE = "all", "none"
_WITHOUT, _ONLY = "all but the chosen", "only the chosen"
_WITHOUT_RANDOM, _ONLY_RANDOM = "all but random ones", "only random ones"
_MEASURES = {
    _WITHOUT: "necessity", _WITHOUT_RANDOM: "necessity", _ONLY: "sufficiency", _ONLY_RANDOM: "sufficiency",
}  # fmt: skip


def head_faithfulness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    selection: HeadSelection | Tensor,
    *,
    layers: Sequence[int] | None = None,
    ablations: Sequence[Ablation] | None = None,
    n_random: int = 5,
    seed: int = 0,
    batch_size: int = 8,
) -> HeadFaithfulness:
    """Measure whether chosen heads are necessary and sufficient for the answers, by ablation and by interchange.

    All circuits run as row groups of the same passes.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: prompts with their two answers; for "interchange" also with a source of as many tokens.
        selection: the result of `select_heads`, or a bool tensor [L, H] that is True at the chosen heads.
        layers: of a tensor, the numbers of its layers; None: all that have heads.
        ablations: "zero" and "interchange", or one of them; None: "zero", and "interchange" where every example has a
            source.
        n_random: number of random choices of as many heads that are measured for comparison; 0: none.
        seed: seed of these choices.
        batch_size: the largest number of prompts in one pass; each runs once per circuit, of which there are
            4 + 2·n_random.

    Returns:
        HeadFaithfulness: `.table()`, `.necessity()`, `.sufficiency()`, `.has_effect()`, `.save()`.

    Raises:
        TypeError, ValueError: bad arguments or examples, no chosen head, or a model whose logit difference does not
            change when all heads are replaced.

    Example:
        >>> selection = af.select_heads(model, tokenizer, train, "attribution", k=10)
        >>> print(af.head_faithfulness(model, tokenizer, test, selection))
    """
    check_counts(batch_size=batch_size)
    check_not_negative(n_random=n_random)
    if not is_integer(seed):
        raise ValueError(f"seed: got {seed!r}, expected an integer")
    given = examples_from(examples)
    if isinstance(selection, HeadSelection):
        if layers is not None:
            raise ValueError("layers: are those of the selection; give them with a tensor only")
        layers, chosen = selection.location.layers, selection.chosen
    elif isinstance(selection, Tensor) and selection.dtype == torch.bool:
        chosen = selection.cpu()
    else:
        raise TypeError(f"selection: got {type(selection).__name__}, expected a HeadSelection or a bool tensor [L, H]")
    if ablations is None:
        ablations = ("zero", "interchange") if all(one.source is not None for one in given) else ("zero",)
    if isinstance(ablations, str) or not ablations:
        raise ValueError(f"ablations: got {ablations!r}, expected a list of 'zero' and 'interchange'")
    for number, ablation in enumerate(ablations):
        check_ablation(ablation)
        if ablation in ablations[:number]:
            raise ValueError(f"ablations: got {ablation!r} more than once")
    subject = Subject(model, tokenizer, given, None if layers is None else tuple(layers), batch_size)
    exists = subject.exists
    if chosen.shape != exists.shape:
        raise ValueError(f"selection: got shape {tuple(chosen.shape)}, expected [L, H] = {list(exists.shape)}")
    if bool((chosen & ~exists).any()) or not bool(chosen.any()):
        raise ValueError("selection: got no head, or one that the model does not have")
    circuits = _circuits(chosen, exists, n_random, seed)
    kept = torch.stack([one for group in circuits.values() for one in group]).float()
    rows = []
    for ablation in ablations:
        parts = circuit_differences(subject, kept, ablation).split([len(group) for group in circuits.values()])
        rows += _rows(ablation, dict(zip(circuits, (part.mean(0) for part in parts), strict=True)), {
            name: (part > 0).double().mean(0) for name, part in zip(circuits, parts, strict=True)
        })  # fmt: skip
    return HeadFaithfulness(rows, int(chosen.sum()), int(exists.sum()), n_random, len(given))


def _circuits(chosen: Tensor, exists: Tensor, n_random: int, seed: int) -> dict[str, list[Tensor]]:
    """By name, the circuits whose mean is a row; bool [L, H] each."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    places = exists.flatten().nonzero().flatten()
    drawn = []
    for _ in range(n_random):
        one = torch.zeros(exists.numel(), dtype=torch.bool, device="cpu")
        one[places[torch.randperm(len(places), generator=generator, device="cpu")[: int(chosen.sum())]]] = True
        drawn.append(one.view(exists.shape))
    found = {_ALL: [exists], _WITHOUT: [exists & ~chosen], _WITHOUT_RANDOM: [exists & ~one for one in drawn]}
    found |= {_ONLY: [chosen], _ONLY_RANDOM: drawn, _NONE: [torch.zeros_like(exists)]}
    return {name: some for name, some in found.items() if some}


def _rows(ablation: str, differences: dict[str, Tensor], correct: dict[str, Tensor]) -> list[FaithfulnessRow]:
    """The rows of one ablation, from values [N] of each circuit."""
    effect = differences[_ALL] - differences[_NONE]
    full, empty = float(differences[_ALL].mean()), float(differences[_NONE].mean())
    if not abs(full - empty) > 1e-12 * max(abs(full), abs(empty), 1e-300):
        raise ValueError(
            f"examples: the mean logit difference is {full:.4g}, whether all heads act or all are replaced ({ablation})"
        )
    rows = []
    for name, values in differences.items():
        part = {"necessity": differences[_ALL] - values, "sufficiency": values - differences[_NONE]}
        ratio = {"share": (part[_MEASURES[name]], effect)} if name in _MEASURES else {}
        means = {"logit_difference": values, "correct": correct[name]} | ({"effect": effect} if name == _ALL else {})
        ends = intervals(means, {}, ratio)
        share = float(ratio["share"][0].mean() / effect.mean()) if ratio else None
        rows.append(FaithfulnessRow(ablation, name, float(values.mean()), float(correct[name].mean()), share, ends))
    return rows


def _with_ends(row: FaithfulnessRow, name: str, form: str) -> str:
    ends = row.intervals.get(name)
    given = form.format(getattr(row, name))
    return given if ends is None else f"{given} [{', '.join(map(form.format, ends))}]"
