"""Comparing a steered model with the frozen one on examples: effectiveness, faithfulness, minimality."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_counts
from .._tables import Readable
from ..architectures.layout import layout
from ..frozen.batching import forward_arguments
from ..frozen.shortcuts import open_frozen_model
from ..frozen.stored_activations import source_activations
from ..interventions import Intervention
from ..modules.evaluation_mode import evaluation_mode
from ..ops import canary
from ..patching.patch import AnyPatch, patch
from ..tasks.examples import prompt_of, sources_of
from ..tasks.loading import ExampleSource
from ..verification.ensure import ensure_verified
from .answer_ranks import AnswerRanks, answer_ranks
from .answer_scores import first_token_divergence
from .encoded_examples import EncodedExamples
from .predictions import Predictions
from .prompt_statistics import Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Readable):
    """Means over examples. "Correct" is z[c] > z[w]: the correct answer's logit is above the wrong one's.

    The pairwise figures say which of the two answers the model prefers, not that it would give one of them: that is
    `top_correct` and `top_wrong`. Evaluations that earlier versions saved have None in the fields that they lack.

    Where an answer has several tokens, z[c] − z[w] stands for log p(c) − log p(w), the difference of the whole answers'
    log-probabilities after the prompt, which for one token each is the same. It is the top token if each of its tokens
    is, after those before; its rank is that of its first token, its probability that of all. The KL divergence and the
    most likely other token are those of the next token after the prompt, without the first tokens of both answers.
    """

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
    #: flip_to_correct among the examples where z[c] > z[w] did not hold in the frozen model; None: there are none.
    newly_correct: float | None = None
    newly_wrong: float | None = None  # flip_to_wrong among those where z[w] > z[c] did not hold
    #: Share of examples where the correct answer is the most likely of all tokens under β = +1, so that greedy
    #: generation begins with it.
    top_correct: float | None = None
    top_wrong: float | None = None  # the same for the wrong answer under β = −1
    rank_correct: float | None = None  # lower median of the correct answer's rank under β = +1; 1: the top token
    rank_wrong: float | None = None  # the same for the wrong answer under β = −1
    probability_correct: float | None = None  # mean probability of the correct answer under β = +1
    probability_wrong: float | None = None  # mean probability of the wrong answer under β = −1
    #: 95 % bootstrap intervals over the prompts, by field; see `bootstrap.intervals`.
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False, repr=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """(label, before, after) for a table; "before" is empty without a baseline."""
        return [(label, before, after) for label, before, after, _ in self.table()[1]]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: a label, the frozen model's figure, the steered one's and its interval."""
        labels = {
            "flip_to_correct": ("correct above wrong, β = +1", "{:.2f}"),
            "newly_correct": (self._of_the_others("flip_to_correct"), "{:.2f}"),
            "flip_to_wrong": ("wrong above correct, β = −1", "{:.2f}"),
            "newly_wrong": (self._of_the_others("flip_to_wrong"), "{:.2f}"),
            "top_correct": ("correct is the top token, β = +1", "{:.2f}"),
            "top_wrong": ("wrong is the top token, β = −1", "{:.2f}"),
            "rank_correct": ("median rank of correct, β = +1", "{:.0f}"),
            "rank_wrong": ("median rank of wrong, β = −1", "{:.0f}"),
            "probability_correct": ("probability of correct, β = +1", "{:.3f}"),
            "probability_wrong": ("probability of wrong, β = −1", "{:.3f}"),
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
            figures = [None if one is None else getattr(one, name) for one in (self.baseline, self)]
            if figures[1] is not None:
                before, after = ("" if figure is None else form.format(figure) for figure in figures)
                ends = self.intervals.get(name)
                rows.append([label, before, after, "" if ends is None else " to ".join(map(form.format, ends))])
        return ["", "before", "after", "95 % interval"], rows

    def _of_the_others(self, name: str) -> str:
        if self.baseline is None:
            return "… where it was not before"
        n = self.n_examples - round(self.n_examples * getattr(self.baseline, name))
        return f"… of the {n} prompt{'s' * (n != 1)} where it was not"

    def _heading(self) -> str:
        return f"Evaluation on {self.n_examples} prompts"

    def to_dict(self) -> dict[str, Any]:
        """All fields, with those of the baseline nested, for JSON; intervals are lists of two numbers."""
        baseline = None if self.baseline is None else self.baseline.to_dict()
        ends = {name: list(both) for name, both in self.intervals.items()}
        return asdict(self) | {"baseline": baseline, "intervals": ends}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The inverse of `to_dict`; raises a TypeError if fields are missing or unknown."""
        baseline, ends = data.get("baseline"), data.get("intervals", {})
        changed = {
            "baseline": None if baseline is None else cls.from_dict(baseline),
            "intervals": {name: (low, high) for name, (low, high) in ends.items()},
        }
        return cls(**data | changed)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    intervention: Intervention,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Run examples without the intervention and with it at β = +1 and β = −1, and compare.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        examples: prompts with their two answers, as for `fit`; prompts with an answer of several tokens run once per
            answer. An intervention that takes activations from a second prompt (such as `BoundlessDAS`) also needs
            their `source`; the others ignore it. With the counterfactual answer as `correct`, `flip_to_correct` is then
            the interchange accuracy between the two answers.
        intervention: the intervention to evaluate, for example a fitted `ActivScalar`.
        batch_size: number of prompts in one forward pass (the two directions together make twice as many rows).
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: bad arguments or examples (see `EncodedExamples`), an example without a source that the
            intervention needs, or with an answer of several tokens where it needs one, or an intervention made for
            another model.
    """
    return evaluate_all(model, tokenizer, examples, [intervention], batch_size=batch_size, progress=progress)[0]


def evaluate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    interventions: Sequence[Intervention],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Evaluation]:
    """`evaluate` for several interventions on the same examples; the frozen model runs once."""
    values, _ = _values(model, tokenizer, examples, interventions, 1.0, batch_size, progress)
    return [evaluation_of(one, *_measured(own)) for one, own in zip(interventions, values.unbind(1), strict=True)]


def evaluation_of(intervention: Intervention, steered: Measured, frozen: Measured) -> Evaluation:
    """The figures of what was measured on some prompts under an intervention, and in the frozen model."""
    common: dict[str, Any] = {"n_examples": len(steered.start), "n_scalars": intervention.n_parameters}
    baseline = Evaluation(**common, **frozen.figures(baseline=True), n_active=0, l1=0.0)
    figures = steered.figures() | {"n_active": intervention.n_active, "l1": intervention.l1}
    return Evaluation(**common, **figures, baseline=baseline)


def measure_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSource,
    interventions: Sequence[Intervention],
    *,
    strength: float = 1.0,
    batch_size: int = 32,
    progress: bool = False,
) -> list[tuple[Measured, Measured]]:
    """What is measured on each prompt, in the order of the examples: (steered, frozen) for each intervention.

    Args:
        model, tokenizer, examples, batch_size, progress: as in `evaluate`.
        interventions: at least one.
        strength: β is this and its negative.
    """
    values, order = _values(model, tokenizer, examples, interventions, strength, batch_size, progress)
    given = torch.tensor(order, device="cpu").argsort()
    return [_measured(own) for own in values[given].unbind(1)]


def _measured(values: Tensor) -> tuple[Measured, Measured]:
    """What was measured on some prompts, [N, 19] as `_measure` returns it: (steered, frozen)."""
    steered = Measured(*values[:, :-6].unbind(-1))
    return steered, steered.frozen(values[:, -6:])


@torch.no_grad()
def _values(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: ExampleSource,
    interventions: Sequence[Intervention], strength: float, batch_size: int, progress: bool,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """([N, interventions, 19] as `_measure` returns it, in the order of the passes; the numbers of its examples)."""
    from tqdm.auto import tqdm

    check_counts(batch_size=batch_size)
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    paths = interventions[0].paths
    found = layout(model, paths)
    data = EncodedExamples(examples, tokenizer, model, paths)
    ensure_verified(data.device, progress=progress)
    sources: dict[Intervention, Tensor] = {}
    for part in dict.fromkeys(part for intervention in interventions for part in intervention.singles):
        if part.needs_source:
            data.refuse_long_answers(f"a {type(part).__name__} is evaluated on the next token alone")
            own = part.source_is_prompt
            texts = [prompt_of(example) for example in data.examples] if own else sources_of(data.examples)
            sources[part] = source_activations(model, tokenizer, part, texts, batch_size=batch_size, progress=progress)
    rows: list[Tensor] = []
    order: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        head, section = stack.enter_context(open_frozen_model(found, model, forward_arguments(model, data.batch([0]))))
        predictions = Predictions(model, data, head, section)
        for batch_rows in tqdm(data.by_length(batch_size), desc="evaluate", disable=not progress, leave=False):
            for alike in data.by_kind(batch_rows):
                of_batch = {part: values[alike] for part, values in sources.items()}
                rows.append(_measure(model, predictions, data, alike, interventions, of_batch, strength))
                order += alike
    canary.collect(wait=True)
    return torch.cat(rows).double().cpu(), order


def _measure(
    model: PreTrainedModel, predictions: Predictions, data: EncodedExamples, rows: list[int],
    interventions: Sequence[Intervention], sources: dict[Intervention, Tensor], beta: float,
) -> Tensor:  # fmt: skip
    """[B, interventions, 19] in float64: the columns of `Measured`, then the ranks of both answers at β = 0."""
    long = rows[0] in data.long_answers
    with contextlib.ExitStack() as idle:
        patched: AnyPatch | None = None
        if long:  # it only says where the prompts end, for other patches of the caller
            patched = patch(model, interventions[0])
            idle.enter_context(patched)
            patched.paused = True
        reference, before, ranks = predictions.run(rows, patched)
    direction = torch.tensor([1.0, -1.0], dtype=torch.float32, device=data.device).repeat_interleave(len(rows))
    correct, wrong, signs = (t.to(reference.device) for t in (data.correct[rows], data.wrong[rows], direction))
    both = reference.repeat(2, 1)
    answers, top = (correct.repeat(2), wrong.repeat(2)), _top_other(reference, correct, wrong).repeat(2)
    wanted = torch.cat([correct, wrong])  # the answer that each row is steered to
    frozen = ranks or answer_ranks(both, wanted)
    found = []
    for intervention in interventions:
        with contextlib.ExitStack() as applied:
            for part in sources.keys() & intervention.singles:
                applied.enter_context(part.interchange(torch.cat([sources[part], sources[part]])))
            strength = beta * (direction.repeat(2) if long else direction)  # long: one row per answer
            patched = patch(model, intervention, strength=strength)
            applied.enter_context(patched)
            steered, differences, ranks = predictions.run([*rows, *rows], patched)
        if long:  # the answers may begin with the same token
            kl = first_token_divergence(steered, both, *answers, exclude_answers=True, kl="forward", head=None)
        else:
            kl = ops.intervention_loss(steered, both, *answers, direction=signs)[1]
        kept = _top_other(steered, *answers) == top
        own = answer_ranks(steered, wanted) if ranks is None else AnswerRanks(*map(_as_steered, ranks))
        columns = [before, differences, kl, kept, *own, *frozen]
        found.append(torch.cat([column.double().view(-1, len(rows)) for column in columns]).T)
    return torch.stack(found, 1)


def _as_steered(values: Tensor) -> Tensor:
    """Values of [answer, direction, prompt] for the answer that each direction is for; [2·B]."""
    correct, wrong = values.view(2, 2, -1)
    return torch.cat([correct[0], wrong[1]])


def _top_other(logits: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    """The most likely token besides the two answers, int64 [B]."""
    top = logits.topk(min(3, logits.shape[-1])).indices  # [B, 3]: one of them is neither
    answer = (top == correct[:, None]) | (top == wrong[:, None])
    return top.gather(-1, answer.long().argmin(-1, keepdim=True)).squeeze(-1)
