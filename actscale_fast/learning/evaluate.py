"""Comparing a steered model with the frozen one on examples: effectiveness, faithfulness, minimality."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_counts
from .._tables import Readable
from ..architectures.layout import layout
from ..frozen.batching import Batch, forward_arguments
from ..frozen.shortcuts import open_frozen_model
from ..interventions import Intervention
from ..modules.evaluation_mode import evaluation_mode
from ..patching.patch import patch
from ..tasks.examples import Example, sources_of
from .encoded_examples import EncodedExamples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Readable):
    """Means over examples. "Correct" is z[c] > z[w]: the correct answer's logit is above the wrong one's."""

    n_examples: int
    flip_to_correct: float  # share of examples with z[c] > z[w] under β = +1
    flip_to_wrong: float  # share of examples with z[w] > z[c] under β = −1
    logit_difference: float  # mean z[c] − z[w] under β = +1
    logit_difference_inverted: float  # mean z[c] − z[w] under β = −1
    kl: float  # mean of the next two, in nats
    kl_correct: float  # mean KL(p₀ ‖ p₊) over V∖{c, w} under β = +1
    kl_wrong: float  # the same under β = −1
    top1: float  # share of examples and directions where the most likely other token is that of the frozen model
    n_active: int  # scalars that are not exactly zero
    n_scalars: int
    l1: float
    baseline: Evaluation | None = None  # the frozen model (β = 0) on the same examples

    def rows(self) -> list[tuple[str, str, str]]:
        """(label, before, after) for a table; "before" is empty without a baseline."""
        labels = {
            "flip_to_correct": ("correct under β = +1", "{:.2f}"),
            "flip_to_wrong": ("wrong under β = −1", "{:.2f}"),
            "logit_difference": ("logit difference, β = +1", "{:+.2f}"),
            "logit_difference_inverted": ("logit difference, β = −1", "{:+.2f}"),
            "kl_correct": ("KL of the other tokens, β = +1", "{:.3f}"),
            "kl_wrong": ("KL of the other tokens, β = −1", "{:.3f}"),
            "kl": ("KL, mean of both", "{:.3f}"),
            "top1": ("most likely other token kept", "{:.2f}"),
            "n_active": (f"active scalars of {self.n_scalars}", "{:d}"),
            "l1": ("ℓ1 norm", "{:.2f}"),
        }
        rows = []
        for name, (label, form) in labels.items():
            before = form.format(getattr(self.baseline, name)) if self.baseline else ""
            rows.append((label, before, form.format(getattr(self, name))))
        return rows

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text."""
        return ["", "before", "after"], [list(row) for row in self.rows()]

    def _heading(self) -> str:
        return f"Evaluation on {self.n_examples} prompts"

    def to_dict(self) -> dict[str, Any]:
        """All fields, with those of the baseline nested, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The inverse of `to_dict`; raises a TypeError if fields are missing or unknown."""
        baseline = data.get("baseline")
        return cls(**data | {"baseline": None if baseline is None else cls.from_dict(baseline)})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    intervention: Intervention,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Run examples without the intervention and with it at β = +1 and β = −1, and compare.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        examples: prompts with their two answers. An intervention that takes activations from a second prompt (such as
            `BoundlessDAS`) also needs their `source`; the others ignore it. With the counterfactual answer as
            `correct`, `flip_to_correct` is then the interchange accuracy between the two answers.
        intervention: the intervention to evaluate, for example a fitted `ActivScalar`.
        batch_size: number of prompts in one forward pass (the two directions together make twice as many rows).
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: bad arguments or examples (see `EncodedExamples`), an example without a source that the
            intervention needs, or an intervention made for another model.
    """
    return evaluate_all(model, tokenizer, examples, [intervention], batch_size=batch_size, progress=progress)[0]


@torch.no_grad()
def evaluate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    interventions: Sequence[Intervention],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Evaluation]:
    """`evaluate` for several interventions on the same examples; the frozen model runs once."""
    from tqdm.auto import tqdm

    check_counts(batch_size=batch_size)
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    paths = interventions[0].paths
    found = layout(model, paths)
    data = EncodedExamples(examples, tokenizer, model, paths)
    sources: dict[Intervention, Tensor] = {}
    for part in dict.fromkeys(part for intervention in interventions for part in intervention.singles):
        if part.needs_source:
            texts = sources_of(data.examples)
            sources[part] = part.source_activations(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    rows: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        head, section = stack.enter_context(open_frozen_model(found, model, forward_arguments(model, data.batch([0]))))

        def logits(batch: Batch) -> Tensor:
            output = section.run(forward_arguments(model, batch))[0]
            return output if head is None else head.logits(output)

        for batch_rows in tqdm(data.by_length(batch_size), desc="evaluate", disable=not progress, leave=False):
            of_batch = {part: values[batch_rows] for part, values in sources.items()}
            rows.append(_measure(model, logits, data, batch_rows, interventions, of_batch))
    evaluations = []
    for intervention, values in zip(interventions, torch.cat(rows).double().cpu().unbind(1), strict=True):
        start, plus, minus, kl_correct, kl_wrong, *tops = values.unbind(-1)
        none = values.new_zeros(1)
        baseline = _summary(intervention, start, start, none, none, none + 1)
        after = _summary(intervention, plus, minus, kl_correct, kl_wrong, torch.cat(tops))
        evaluations.append(replace(after, baseline=replace(baseline, n_active=0, l1=0.0)))
    return evaluations


def _measure(
    model: PreTrainedModel, logits: Callable[[Batch], Tensor], data: EncodedExamples, rows: list[int],
    interventions: Sequence[Intervention], sources: dict[Intervention, Tensor],
) -> Tensor:  # fmt: skip
    """[B, interventions, 7]: z[c] − z[w] at β = 0, +1, −1; the KL, and whether the top other token is kept, at ±1."""
    batch = data.batch(rows)
    reference = logits(batch)
    direction = torch.tensor([1.0, -1.0], dtype=torch.float32, device=data.device).repeat_interleave(len(rows))
    correct, wrong, signs = (t.to(reference.device) for t in (data.correct[rows], data.wrong[rows], direction))
    before, both = _difference(reference, correct, wrong), reference.repeat(2, 1)
    answers, top = (correct.repeat(2), wrong.repeat(2)), _top_other(reference, correct, wrong).repeat(2)
    found = []
    for intervention in interventions:
        with contextlib.ExitStack() as applied:
            for part in sources.keys() & intervention.singles:
                applied.enter_context(part.interchange(torch.cat([sources[part], sources[part]])))
            applied.enter_context(patch(model, intervention, strength=direction))
            steered = logits(batch.repeat(2))
        kl = ops.intervention_loss(steered, both, *answers, direction=signs)[1]
        differences = _difference(steered, *answers).view(2, -1)
        kept = _top_other(steered, *answers) == top
        found.append(torch.stack([before, *differences, *kl.view(2, -1), *kept.float().view(2, -1)], -1))
    return torch.stack(found, 1)


def _summary(
    intervention: Intervention, plus: Tensor, minus: Tensor, kl_correct: Tensor, kl_wrong: Tensor, kept: Tensor
) -> Evaluation:
    """Means: z[c] − z[w] under β = +1 (`plus`) and −1 (`minus`), both divergences, each [N]; `kept` [2·N]."""
    return Evaluation(
        n_examples=len(plus),
        flip_to_correct=float((plus > 0).double().mean()),
        flip_to_wrong=float((minus < 0).double().mean()),
        logit_difference=float(plus.mean()),
        logit_difference_inverted=float(minus.mean()),
        kl=float(torch.cat([kl_correct, kl_wrong]).mean()),
        kl_correct=float(kl_correct.mean()),
        kl_wrong=float(kl_wrong.mean()),
        top1=float(kept.mean()),
        n_active=intervention.n_active,
        n_scalars=intervention.n_parameters,
        l1=intervention.l1,
    )


def _top_other(logits: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    """The most likely token besides the two answers, int64 [B]."""
    top = logits.topk(min(3, logits.shape[-1])).indices  # [B, 3]: one of them is neither
    answer = (top == correct[:, None]) | (top == wrong[:, None])
    return top.gather(-1, answer.long().argmin(-1, keepdim=True)).squeeze(-1)


def _difference(logits: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    columns = torch.stack([correct, wrong], -1)
    difference: Tensor = logits.gather(-1, columns).to(torch.float32).diff(dim=-1)
    return -difference.squeeze(-1)
