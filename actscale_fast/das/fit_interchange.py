"""Fitting Boundless DAS on pairs of a base and a source: where does a model keep a causal variable?"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_counts, is_finite
from ..learning import checkpoint as checkpoints
from ..learning.arguments import refuse_inference_mode
from ..learning.encoded_examples import EncodedExamples
from ..learning.fit_settings import FitSettings
from ..learning.identity import examples_identity, model_identity
from ..learning.termination import saving_on_sigterm
from ..patching.patch import Patch
from ..tasks.examples import Example, sources_of
from .boundless_das import LEAST_BOUNDARY, BoundlessDAS
from .pairs import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIGURES = ("loss", "cross_entropy", "accuracy", "boundary")


@dataclass(slots=True)
class InterchangeResult:
    """A fitted interchange, with the record of its fit."""

    intervention: BoundlessDAS
    #: One record per step: step, loss, cross_entropy, accuracy (the share of the step's pairs for which the
    #: counterfactual answer is the most likely token), boundary (the mean), temperature, lr (of the rotations).
    history: list[dict[str, float]] = field(repr=False)
    #: The duration of this call; steps of a fit that it resumed are not included.
    seconds: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """The settings of a fit, checked."""

    steps: FitSettings
    boundary_lr: float
    boundary_weight: float
    temperature: tuple[float, float]
    warmup: float

    def __post_init__(self) -> None:
        if not (is_finite(self.boundary_lr) and self.boundary_lr > 0):
            raise ValueError(f"boundary_lr: got {self.boundary_lr!r}, expected a positive number")
        if not (is_finite(self.boundary_weight) and self.boundary_weight >= 0):
            raise ValueError(f"boundary_weight: got {self.boundary_weight!r}, expected a number >= 0")
        pair = isinstance(self.temperature, Sequence) and len(self.temperature) == 2
        if not (pair and all(is_finite(value) and value > 0 for value in self.temperature)):
            raise ValueError(f"temperature: got {self.temperature!r}, expected two positive numbers, first and last")
        if not (is_finite(self.warmup) and 0 <= self.warmup < 1):
            raise ValueError(f"warmup: got {self.warmup!r}, expected a share of the steps, at least 0 and below 1")

    def factor(self, step: int) -> float:
        """The factor of both learning rates: a linear warm-up, then linear decay to 0 after the last step."""
        n_steps = self.steps.steps
        n_warm = round(self.warmup * n_steps)
        return (step + 1) / n_warm if step < n_warm else (n_steps - step) / (n_steps - n_warm)

    def temperature_at(self, step: int) -> float:
        """The temperature of a step, linear between the first and the last."""
        first, last = self.temperature
        done = step / (self.steps.steps - 1) if self.steps.steps > 1 else 1.0
        return first + (last - first) * done


def fit_interchange(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    das: BoundlessDAS,
    *,
    epochs: int = 3,
    steps: int | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    rotation_lr: float = 1e-3,
    boundary_lr: float = 1e-2,
    boundary_weight: float = 1.0,
    temperature: tuple[float, float] = (50.0, 0.1),
    warmup: float = 0.1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
) -> InterchangeResult:
    """Learn an interchange in place, so that it gives the examples' counterfactual answers.

    Minimises cross-entropy(correct answer at the last token, over the whole vocabulary) + boundary_weight · mean
    boundary with Adam on a frozen model (arXiv 2305.08809). The sources' activations, the layers below the lowest
    interchange and the tokens before the first one are computed only once.

    The learning rates, weight, temperatures, warm-up, epochs and pairs per forward pass are the published settings,
    which were made for 8000 pairs and a 7B model and used four passes of 16 pairs per update (batch_size=64,
    accumulate=4). These choices are ours: one pass per update, since a small set of pairs would leave few updates;
    linear decay to 0 after the warm-up; the boundary is clamped to [1e-3, 1] after each step, and the mean of several
    boundaries is minimised.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: bases (`prompt`) with their `source`; `correct` is the counterfactual answer.
        das: its rotations and boundaries are the starting point; it ends at the last temperature.
        epochs: how often each pair is used.
        steps: the number of updates, instead of epochs.
        batch_size: pairs per update; at most all examples.
        accumulate: passes into which an update is split to save memory; the gradient is the same up to rounding.
        rotation_lr, boundary_lr: Adam's learning rates.
        boundary_weight: the weight of the mean boundary in the loss.
        temperature: the first and the last; linear in between.
        warmup: share of the steps.
        seed: seed of the order of the examples.
        checkpoint: a file to which the state is written atomically every `checkpoint_every` steps, at the end, and on
            Ctrl-C or SIGTERM. If it exists, the fit resumes from it, with the same bits as without the interruption.
        progress: show a progress bar.

    Returns:
        InterchangeResult.

    Raises:
        TypeError, ValueError: bad arguments or examples, an example without a source, a checkpoint of another fit.
        OSError: the checkpoint cannot be written, which is checked before the model runs; the message names the path.
        RuntimeError: called in torch.inference_mode().
        FloatingPointError: the loss or its gradient is not finite; no parameter was changed by that step.

    Example:
        >>> das = BoundlessDAS.for_model(model, layers=[22], positions=[-1])
        >>> fit_interchange(model, tokenizer, train, das)
        >>> evaluate(model, tokenizer, test, das).flip_to_correct  # interchange accuracy between the two answers
    """
    if not isinstance(das, BoundlessDAS):
        raise TypeError(f"das: got {type(das).__name__}, expected a BoundlessDAS (fit learns others)")
    check_counts(epochs=epochs, batch_size=batch_size, accumulate=accumulate, checkpoint_every=checkpoint_every)
    refuse_inference_mode("fit_interchange")
    data = EncodedExamples(examples, tokenizer, model, das.location.paths)
    texts = sources_of(data.examples)
    if steps is None:
        steps = epochs * math.ceil(len(data) / batch_size)
    settings = FitSettings(steps=steps, lr=rotation_lr, batch_size=batch_size, seed=seed, schedule="constant")
    plan = _Plan(settings, boundary_lr, boundary_weight, temperature, warmup)
    if checkpoint is not None:
        checkpoints.check_writable_checkpoint(checkpoint, new=True)
    Patch(model, das).remove()  # refuses another model's interchange, and moves the parameters to this model's device
    begun = time.perf_counter()
    identity = {} if checkpoint is None else _identity(data, das, plan, accumulate, model)
    fit = _Fit(das, plan, accumulate, checkpoint, identity)
    fit.resume()
    if fit.taken < steps:
        if checkpoint is not None:
            checkpoints.check_writable_checkpoint(checkpoint, fit.tensors())
        sources = das.source_activations(model, tokenizer, texts, progress=progress)
        saving = saving_on_sigterm(checkpoint is not None)
        with saving, torch.enable_grad(), Pairs(model, data, das, sources) as pairs, _bar(fit, progress) as bar:
            try:
                while fit.taken < steps:
                    fit.step(pairs)
                    bar.set_postfix_str(_summary(fit.history[-1]), refresh=False)
                    bar.update()
                    if fit.taken % checkpoint_every == 0:
                        fit.save()
            finally:
                fit.save()
    return InterchangeResult(das, fit.history, time.perf_counter() - begun)


class _Fit:
    """The state of a fit: parameters, Adam's moments, history and checkpoint."""

    def __init__(
        self, das: BoundlessDAS, plan: _Plan, accumulate: int, checkpoint: str | os.PathLike[str] | None,
        identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.das, self.plan, self.accumulate, self.checkpoint = das, plan, accumulate, checkpoint
        self.identity = identity
        self.named = dict(das.named_parameters())
        rotations = [value for name, value in self.named.items() if name != "boundary"]
        self.adam = torch.optim.Adam(
            [{"params": rotations, "lr": plan.steps.lr}, {"params": [das.boundary], "lr": plan.boundary_lr}]
        )
        for value in self.named.values():  # as Adam itself begins
            moments = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[value] = {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **moments}
        self.history: list[dict[str, float]] = []
        self.taken = 0
        self._whole, self._saved = True, -1

    def step(self, pairs: Pairs) -> None:
        """Update rotations and boundaries once."""
        das, plan = self.das, self.plan
        rows = plan.steps.rows(len(pairs.data), self.taken)
        das.temperature.fill_(plan.temperature_at(self.taken))
        factor = plan.factor(self.taken)
        self.adam.zero_grad(set_to_none=True)
        entropy, hits = torch.zeros(2, device=das.device, dtype=das.boundary.dtype).unbind()
        size = math.ceil(len(rows) / self.accumulate)
        with das.shared_rotation():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                logits = pairs.logits(part)
                correct = pairs.data.correct[part].to(logits.device)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(wide, correct, reduction="sum") / len(rows)
                loss.backward()
                entropy = entropy + loss.detach().to(entropy)
                hits = hits + (logits.detach().argmax(-1) == correct).sum().to(hits)
        boundary = das.boundary.mean()
        (plan.boundary_weight * boundary).backward()
        figures = torch.stack(
            [entropy + plan.boundary_weight * boundary.detach(), entropy, hits / len(rows), boundary.detach()]
        )
        rates = plan.steps.lr, plan.boundary_lr
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        finite = torch.stack([figures.isfinite().all(), *(value.grad.isfinite().all() for value in self._learned())])
        before = [value.detach().clone() for value in self._learned()]
        self._whole = False
        self.adam.step()
        with torch.no_grad():
            das.boundary.clamp_(LEAST_BOUNDARY, 1.0)
            for value, old in zip(self._learned(), before, strict=True):
                value.copy_(torch.where(finite.all(), value, old))
        self.adam.zero_grad(set_to_none=True)
        record = {"step": self.taken, "temperature": plan.temperature_at(self.taken), "lr": factor * rates[0]}
        self.taken += 1
        self._whole = True
        # The Cayley map solves linear equations, which synchronises with a GPU anyway.
        *values, is_finite = torch.cat([figures, finite.all()[None].to(figures)]).tolist()
        found = dict(zip(_FIGURES, values, strict=True))
        if not is_finite:
            self._whole = False  # nothing is saved
            raise FloatingPointError(f"step {record['step']}: the loss is {found['loss']}, or its gradient not finite")
        self.history.append(record | found)

    def _learned(self) -> list[Any]:
        return [value for value in self.named.values() if value.grad is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, and the rotations' constant factors."""
        state: dict[str, Tensor] = {name: value.detach() for name, value in self.das.state_dict(keep_vars=True).items()}
        for name, value in self.named.items():
            state |= {f"{name}.{key}": moment for key, moment in self.adam.state[value].items()}
        return state

    def resume(self) -> None:
        """Continue from the checkpoint where there is one."""
        if self.checkpoint is None:
            return
        state = checkpoints.load(self.checkpoint, self.identity, self.tensors())
        if state is not None:
            checkpoints.restore(state, self.tensors())
            self.history, self.taken, self._saved = state.history, state.step, state.step

    def save(self) -> None:
        """Write the checkpoint, except within an update or after a loss that is not finite."""
        if self.checkpoint is None or not self._whole or self._saved == self.taken:
            return
        checkpoints.save(self.checkpoint, checkpoints.SavedFit(self.taken, self.tensors(), self.history), self.identity)
        self._saved = self.taken


def _identity(
    data: EncodedExamples, das: BoundlessDAS, plan: _Plan, accumulate: int, model: PreTrainedModel
) -> dict[str, Any]:
    """What distinguishes this fit from others, as JSON."""
    own = {
        "boundary_lr": plan.boundary_lr,
        "boundary_weight": plan.boundary_weight,
        "temperature": list(plan.temperature),
        "warmup": plan.warmup,
        "accumulate": accumulate,
        "intervention": type(das).__name__,
        "location": das.location.to_dict(),
    }
    return plan.steps.to_dict() | own | examples_identity(data, range(len(data))) | model_identity(model, True)


def _summary(record: dict[str, float]) -> str:
    return f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.2f}  boundary {record['boundary']:.3f}"


def _bar(fit: _Fit, show: bool) -> Any:
    from tqdm.auto import tqdm

    total = fit.plan.steps.steps
    return tqdm(total=total, initial=fit.taken, desc="interchange", disable=not show, unit="step", dynamic_ncols=True)
