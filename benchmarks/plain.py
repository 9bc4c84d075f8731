"""A step of a fit as one writes it with PyTorch and transformers alone; the same in float64, some prompts at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actscale_fast.architectures.layout import layout
from actscale_fast.frozen.batching import next_token_logits

from .steps import BETAS, LR, Results, Work

#: Tokens of the float64 computation at a time: a large model's activations of all would not fit beside its weights.
_EXACT_TOKENS = 512


class Plain:
    """A step of one fit with hooks, full logits, F.kl_div and Adam, as one writes it with PyTorch and transformers.

    Args:
        work, fit: the fit is this one of the work.
        model: another copy of its model.
        rows: some of the fit's prompts; None: all.
        stacked: both directions in one batch.
    """

    def __init__(
        self, work: Work, fit: int = 0, *, model: Any = None, rows: Sequence[int] | None = None, stacked: bool = False
    ) -> None:
        self.model = work.model if model is None else model
        self.objective, self.layers, self.last_only = work.objectives[fit], work.layers, work.last_only
        self.stacked = stacked
        rows = work.rows[fit] if rows is None else rows
        dtype = torch.promote_types(self.model.dtype, torch.float32)  # of scalars and losses
        self.start = work.starts[fit].to(work.data.device, dtype)
        self.alpha = self.start.clone().requires_grad_()  # [L, 1, H]
        self.optimizer = torch.optim.Adam([self.alpha], lr=LR, betas=BETAS)
        self.answers = torch.stack([work.data.correct[rows], work.data.wrong[rows]], -1)  # [N, 2]
        batch = work.data.batch(rows)
        with torch.no_grad():
            self.log_p = self._log_probabilities(next_token_logits(self.model, batch).to(dtype))
        batch = batch.repeat(2) if stacked else batch
        mask = batch.attention_mask
        self.arguments = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
        self.arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
        projections = layout(self.model).projections
        self.projections = [projections[layer] for layer in work.layers]

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.scatter(1, self.answers, torch.finfo(logits.dtype).min).log_softmax(-1)

    def _scale(self, index: int, heads: Tensor, strength: Tensor) -> Tensor:
        """The steered heads [B, T, H, D] of one of the layers."""
        factor = 1 + strength[:, None] * self.alpha[index, 0]  # [B or 1, H]
        return heads * factor[:, None, :, None].to(heads.dtype)

    def _hook(self, index: int, strength: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def scale(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            heads = inputs[0].unflatten(-1, (self.alpha.shape[-1], -1))
            if self.last_only:
                last = self._scale(index, heads[:, -1:], strength)
                return (torch.cat([heads[:, :-1], last], 1).flatten(-2),)
            return (self._scale(index, heads, strength).flatten(-2),)

        return scale

    def _logits(self, strength: Tensor) -> Tensor:
        """The next-token logits under these strengths, one a row or one for all."""
        hooks = [
            projection.register_forward_pre_hook(self._hook(index, strength))
            for index, projection in enumerate(self.projections)
        ]
        try:
            logits: Tensor = self.model(**self.arguments).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return logits.to(self.alpha.dtype)

    def _terms(self, direction: float, logits: Tensor) -> Tensor:
        """Effectiveness and faithfulness [2] of one direction."""
        chosen = logits.gather(1, self.answers)
        hinge = torch.relu(self.objective.margin - direction * (chosen[:, 0] - chosen[:, 1])).mean()
        divergence = F.kl_div(self._log_probabilities(logits), self.log_p, reduction="batchmean", log_target=True)
        return torch.stack([hinge, divergence])

    def __call__(self) -> Results:
        self.alpha.data.copy_(self.start)
        directions = [float(sign) for sign in self.objective.directions]
        strengths = torch.tensor(directions, device=self.start.device, dtype=self.start.dtype)
        if self.stacked:
            together = self._logits(strengths.repeat_interleave(len(self.answers))).chunk(len(strengths))
        else:
            together = tuple(self._logits(strength[None]) for strength in strengths)
        terms = [self._terms(direction, logits) for direction, logits in zip(directions, together, strict=True)]
        effectiveness, faithfulness = torch.stack(terms).sum(0)
        loss = effectiveness + self.objective.faithfulness * faithfulness
        (gradient,) = torch.autograd.grad(loss, self.alpha)
        self.alpha.grad = gradient + self.objective.minimality_weight * self.alpha.detach().sign()
        self.optimizer.step()
        return effectiveness.detach()[None], faithfulness.detach()[None], gradient[None]


class PlainFits:
    """A plain step of every fit, one after another."""

    def __init__(self, work: Work, *, stacked: bool = False) -> None:
        self.fits = [Plain(work, fit, stacked=stacked) for fit in range(len(work.rows))]

    def __call__(self) -> Results:
        effectiveness, faithfulness, gradient = (
            torch.cat(column) for column in zip(*(fit() for fit in self.fits), strict=True)
        )
        return effectiveness, faithfulness, gradient


class _Sized(Plain):
    """A plain step that also notes the sum of the magnitudes of the terms whose sum each result is."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.sizes = (torch.zeros(()), torch.zeros(()), torch.zeros(()))
        super().__init__(*given, **options)
        zero = self.start.new_zeros(())
        self.sizes = (zero, zero.clone(), torch.zeros_like(self.start))

    def _scale(self, index: int, heads: Tensor, strength: Tensor) -> Tensor:
        scaled = super()._scale(index, heads, strength)
        kept = heads.detach()

        def note(grad: Tensor) -> None:  # dα = β·Σ h·dy, over prompts, tokens and the head's dimensions; |β| = 1
            self.sizes[2][index, 0].add_((kept * grad).abs().sum((0, 1, 3)))

        if scaled.requires_grad:
            scaled.register_hook(note)
        return scaled

    def _terms(self, direction: float, logits: Tensor) -> Tensor:
        with torch.no_grad():
            self.sizes[0].add_(self.objective.margin + logits.gather(1, self.answers).abs().sum(1).mean())
            log_q = self._log_probabilities(logits)
            p, sizes = self.log_p.exp(), self.log_p.abs() + log_q.abs()  # infinite for the answers, whose p is 0
            self.sizes[1].add_((p * torch.where(p > 0, sizes, 0)).sum(1).mean())
        return super()._terms(direction, logits)


class Exact:
    """The results in float64, a few prompts at a time, and the size of the terms that they sum; computed once."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._found: tuple[Results, tuple[float, ...]] | None = None

    def results(self) -> Results:
        return self._all()[0]

    def terms(self) -> tuple[float, ...]:
        return self._all()[1]

    def _all(self) -> tuple[Results, tuple[float, ...]]:
        if self._found is None:
            model = copy.deepcopy(self.work.model).double()
            made = [self._of_fit(model, fit) for fit in range(len(self.work.rows))]
            effectiveness, faithfulness, gradient = (torch.cat([one[0][i] for one in made]) for i in range(3))
            sizes = tuple(max(one[1][i] for one in made) for i in range(3))
            self._found = (effectiveness, faithfulness, gradient), sizes
        return self._found

    def _of_fit(self, model: Any, fit: int) -> tuple[list[Tensor], list[float]]:
        rows, prompts = self.work.rows[fit], self.work.data.prompts
        step = max(1, _EXACT_TOKENS // max(len(prompts[row]) for row in rows))
        totals: list[Tensor] = []
        sizes: list[Tensor] = []
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            plain = _Sized(self.work, fit, model=model, rows=some)
            share = len(some) / len(rows)  # every result is a mean over prompts
            found, found_sizes = [share * result for result in plain()], [share * size for size in plain.sizes]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
            sizes = [a + b for a, b in zip(sizes, found_sizes, strict=True)] if sizes else found_sizes
        return totals, [float(size.max()) for size in sizes]
