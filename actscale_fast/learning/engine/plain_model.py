"""The plain way to the loss of two prompts: unpadded, without a cache, through all logits, one prompt at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.hugging_face import unwrap
from ...architectures.layout import layout
from ...architectures.sharding import model_processes
from ...frozen.batching import Batch, forward_arguments
from ...interventions import Intervention
from ...patching.patch import AnyPatch
from ..encoded_examples import EncodedExamples
from ..objective import Objective
from .recomputation import layers_recomputed

#: Larger than every logit difference (per token of an answer), so that the hinge is linear.
MARGIN = 100.0


@dataclass(frozen=True)
class LossAndGradients:
    """The loss and its gradients at some parameters."""

    loss: float
    gradients: list[Tensor]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and all(bool(gradient.isfinite().all()) for gradient in self.gradients)


class PlainModel:
    """E + F of two prompts by the plain model and autograd, a mean over the prompts, in float64.

    Args:
        model: the model, plain or compiled; the one inside a wrapper runs.
        data: the examples.
        intervention: the intervention that is learned.
        patched: its patch, alone or among others.
        group: the group of a stacked intervention that is tried, or None.
        objective: gives the directions, the KL and whether answers are excluded.
        recompute: as in `Execution`.
    """

    def __init__(
        self, model: nn.Module, data: EncodedExamples, intervention: Intervention, patched: AnyPatch,
        group: int | None, objective: Objective, recompute: bool | str = False,
    ) -> None:  # fmt: skip
        self.found, self.recompute = layout(unwrap(model), intervention.paths), recompute
        self.model, self.data, self.patched, self.group = model, data, patched, group
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        self.together = model_processes(unwrap(model))
        self.rows = _some_rows(data)
        long = [data.long_answers[row] for row in self.rows if row in data.long_answers]
        self.margin = MARGIN * max((answers.longest for answers in long), default=1)
        self.objective = replace(objective, margin=self.margin, faithfulness=1.0, minimality=0.0)
        with torch.no_grad():  # first, as in the engine: some quantised layers have no backward afterwards
            self.references = {row: self._logits(self._ids(row), [0.0]) for row in self.rows}

    @property
    def hinges(self) -> float:
        """What the margin adds to the loss."""
        return self.margin * len(self.objective.directions)

    @torch.no_grad()
    def loss(self) -> float:
        """The loss at the current parameters."""
        return self.together.leaders(float(self._loss()))

    def loss_and_gradients(self) -> LossAndGradients:
        """The loss and its gradients at the current parameters."""
        gradients = [torch.zeros_like(value) for value in self.parameters]
        losses = []
        for row in self.rows:  # one after another, so that the activations of one are in memory
            n_tokens = len(self.data.joined(row)) * len(self.objective.directions)
            with torch.enable_grad(), layers_recomputed(self.found, self.recompute, n_tokens):
                loss = self._prompt_loss(row) / len(self.rows)
                losses.append(loss.detach())
                if not loss.requires_grad:
                    continue
                found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for total, added in zip(gradients, found, strict=True):
                if added is not None:
                    total += added
        loss = torch.stack(losses).sum()
        self.together.broadcast_(gradients)  # what is decided by them is decided alike by all that hold the model
        return LossAndGradients(self.together.leaders(float(loss)), gradients)

    @contextlib.contextmanager
    def moved(self, step: list[Tensor], factor: float) -> Iterator[None]:
        """Move the parameters by a multiple of a step inside the block."""
        before = [value.detach().clone() for value in self.parameters]
        try:
            with torch.no_grad():
                for value, change in zip(self.parameters, step, strict=True):
                    value.add_(factor * change.to(value.dtype))
            yield
        finally:
            with torch.no_grad():
                for value, old in zip(self.parameters, before, strict=True):
                    value.copy_(old)

    def _loss(self) -> Tensor:
        return torch.stack([self._prompt_loss(row) for row in self.rows]).mean()

    def _prompt_loss(self, row: int) -> Tensor:
        """The loss of one prompt, written out in float64 and without the kernels of the engine."""
        directions = self.objective.directions
        strengths = [float(sign) for sign in directions]
        ids, reference = self._ids(row), self.references[row].expand(len(directions), -1)
        z = self._logits(ids.expand(len(directions), -1), strengths).double()
        answers = (self.data.correct[[row]], self.data.wrong[[row]])
        correct, wrong = (ids.expand(len(directions)).to(z.device) for ids in answers)
        sign = torch.tensor(strengths, dtype=torch.float64, device=z.device)
        if row in self.data.long_answers:
            long = self.data.long_answers[row]
            difference = self._log_probability(row, long.correct, strengths).to(z.device)
            difference = difference - self._log_probability(row, long.wrong, strengths).to(z.device)
        else:
            difference = z.gather(1, correct[:, None])[:, 0] - z.gather(1, wrong[:, None])[:, 0]
        margin, (exclude_answers, kl) = self.objective.loss_options
        p, q = reference.double(), z
        if exclude_answers:
            others = torch.ones_like(z, dtype=torch.bool).scatter_(1, torch.stack([correct, wrong], 1), False)
            p, q = (one[others].view(len(z), -1) for one in (p, q))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        if kl == "reverse":
            p, q = q, p
        divergence = (p.exp() * torch.where(p > -torch.inf, p - q, 0.0)).sum(-1)
        return (torch.relu(margin - sign * difference) + divergence).sum()

    def _log_probability(self, row: int, answer: Sequence[int], strengths: list[float]) -> Tensor:
        """log p(answer) after the prompt, under each strength [R]; the answer's tokens count as generated ones."""
        prompt = self._ids(row)
        own = torch.tensor([answer], device=prompt.device)
        ids = torch.cat([prompt, own[:, :-1]], 1).expand(len(strengths), -1)
        with self.patched.prompt(prompt.shape[1]):
            logits = self._logits(ids, strengths, n_last=len(answer)).double()
        chosen = logits.log_softmax(-1).gather(2, own.to(logits.device).expand(len(strengths), -1)[..., None])
        return chosen[..., 0].sum(-1)

    def _ids(self, row: int) -> Tensor:
        return torch.tensor([self.data.prompts[row]], device=self.data.device)

    def _logits(self, ids: Tensor, strengths: list[float], n_last: int | None = None) -> Tensor:
        """The logits of each row under its strength: of the last token [R, V], or of the last n_last [R, n_last, V]."""
        model: Any = self.model
        device = self.parameters[0].device
        group = None if self.group is None else torch.full((len(ids),), self.group, device=device)
        self.patched.set_rows(torch.tensor(strengths, dtype=torch.float32, device=device), group)
        batch = Batch(ids, torch.ones_like(ids), padded=False)
        logits: Tensor = model(**forward_arguments(model, batch, n_last=n_last or 1)).logits
        return logits[:, -1] if n_last is None else logits[:, -n_last:]


def _some_rows(data: EncodedExamples) -> list[int]:
    """Two prompts, or two with answers of one token and two with answers of several if there are both."""
    kinds = [[row for row in range(len(data)) if (row in data.long_answers) is long] for long in (False, True)]
    return [row for rows in kinds if rows for row in _two_rows(data, rows)]


def _two_rows(data: EncodedExamples, rows: Sequence[int]) -> list[int]:
    """The shortest prompt, and the shortest longer one (or else another one, or else the same one alone)."""
    order = sorted(rows, key=lambda row: len(data.prompts[row]))
    first = order[0]
    longer = [row for row in order if len(data.prompts[row]) > len(data.prompts[first])]
    return [first, *(longer or order[1:])[:1]]
