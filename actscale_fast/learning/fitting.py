"""Learning an intervention's parameters with Adam and a proximal step, on a frozen model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import defaults, ops
from ..interventions import Intervention, Location
from ..models import Patch, layout, patch
from . import checkpoint as checkpoints
from .encoding import EncodedExamples, next_token_logits
from .examples import Example
from .modes import frozen
from .objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(slots=True)
class FitResult:
    """A fitted intervention and how it came about."""

    intervention: Intervention
    #: One record a step: step, loss, effectiveness, faithfulness, minimality, n_active, lr. The two terms and the loss
    #: are those of the parameters that the step began with; minimality (‖α‖₁) and n_active those that it left, so that
    #: the last record tells the fitted intervention's.
    history: list[dict[str, float]] = field(repr=False)
    #: Of this call; a resumed fit counts its own steps only.
    seconds: float


class _Parameters:
    """The intervention's parameters with their Adam moments: all that a step changes."""

    def __init__(self, module: nn.Module) -> None:
        self.named = {name: value for name, value in module.named_parameters() if value.requires_grad}
        if not self.named:
            raise ValueError(f"intervention: {type(module).__name__} has no parameters that require a gradient")
        self.values = list(self.named.values())
        self.moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self.values]
        self.steps = [torch.zeros((), device=value.device) for value in self.values]

    def tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for (name, value), (first, second), step in zip(self.named.items(), self.moments, self.steps, strict=True):
            state |= {name: value.data, f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second, f"{name}.step": step}
        return state

    def update(self, gradients: Sequence[Tensor], lr: float, l1: float, betas: tuple[float, float]) -> None:
        for value, gradient, moments, step in zip(self.values, gradients, self.moments, self.steps, strict=True):
            ops.proximal_adam_(value.data, gradient, *moments, step, lr=lr, l1=l1, betas=betas)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    intervention: Intervention,
    objective: Objective | None = None,
    *,
    steps: int = defaults.STEPS,
    lr: float = defaults.LR,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    schedule: Schedule = defaults.SCHEDULE,
    betas: tuple[float, float] = (0.9, 0.99),
    accumulate: int = defaults.ACCUMULATE,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = defaults.CHECKPOINT_EVERY,
    progress: bool = True,
) -> FitResult:
    """Learn `intervention` in place so that it flips the examples' answers, leaves other tokens alone and stays sparse.

    Each step runs the prompts of one batch under all directions at once, takes the losses and their gradient from one
    fused op, and updates all scalars in one launch: Adam, then the soft threshold that makes zeros exact. The frozen
    model's logits are computed once. The model's weights, modes and gradients are left as they were. Gradients are
    enabled inside, whatever the caller's mode.

    Examples end where the answer begins: no token is generated. The slot of `generated=True` therefore learns nothing:
    it stays at its starting value, 0 (the ℓ1 term takes any other start to 0; minimality=0 leaves it).

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer.
        examples: prompts with their two answers.
        intervention: for example `ActivScalar.for_model(model)`; its parameters are the starting point.
        objective: the weights of the three terms; `Objective()` where None.
        steps: number of updates.
        lr: Adam's learning rate, in units of the scalars; `schedule` lets it fall to 0 by a cosine or a line, or not.
        batch_size: prompts an update; larger than the number of examples means all of them.
        seed: of the order of the examples.
        betas: Adam's.
        accumulate: forward passes an update is split into, to save memory; the gradient is the same to rounding.
        checkpoint: a file that the state is written to, atomically, every `checkpoint_every` steps and at the end.
            Where it exists the fit resumes from it, to the same bits as an uninterrupted one.
        progress: show a progress bar with the three terms, the number of active scalars and the time left.

    Returns:
        FitResult with the intervention, the history of each step and the seconds taken.

    Raises:
        TypeError, ValueError: bad arguments or examples, an intervention or a checkpoint of another model or fit, an
            intervention on generated tokens alone.
        RuntimeError: under torch.inference_mode(), which gradients cannot be enabled in.
        FloatingPointError: a term became NaN or infinite; names the step and the term. The parameters are those of the
            step before.

    Example:
        >>> scalars = af.ActivScalar.for_model(model)
        >>> af.fit(model, tokenizer, examples, scalars, af.Objective(faithfulness=0.5), steps=40)
    """
    objective = Objective() if objective is None else objective
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected an Objective or None")
    _check_counts(steps=steps, batch_size=batch_size, accumulate=accumulate, checkpoint_every=checkpoint_every)
    _check_step(lr, schedule, betas, seed)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit needs gradients, which torch.inference_mode() rules out; call it outside that mode")
    location = _location(intervention)
    data = EncodedExamples(examples, tokenizer, model, location.paths)
    # Refuses another model's intervention before any work, and moves the parameters to this model's device.
    patch(model, intervention).remove()
    parameters = _Parameters(intervention)
    settings = {
        "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "schedule": schedule, "betas": list(betas),
        "accumulate": accumulate, "objective": asdict(objective) | {"directions": list(objective.directions)},
        "intervention": type(intervention).__name__, "location": location.to_dict(),
        "examples": checkpoints.digest([asdict(example) for example in data.examples]),
        "tokens": checkpoints.digest([data.prompts, data.correct.tolist(), data.wrong.tolist()]),
        "model": checkpoints.weights_digest(layout(model, location.paths).projections),
    }  # fmt: skip
    begun = time.perf_counter()
    history: list[dict[str, float]] = []
    if checkpoint is not None:
        state = checkpoints.load(checkpoint, settings, parameters.tensors())
        if state is not None:
            checkpoints.restore(state, parameters.tensors())
            history = state.history

    def save() -> None:
        if checkpoint is not None:
            checkpoints.save(checkpoint, checkpoints.FitState(len(history), parameters.tensors(), history), settings)

    whole = True  # parameters, moments and history are of one step
    l1 = intervention.l1
    with torch.enable_grad(), frozen(model):
        reference = _reference(model, data, batch_size)
        with patch(model, intervention) as patched, _bar(steps, len(history), progress) as bar:
            try:
                for step in range(len(history), steps):
                    rows = _batch_rows(len(data), batch_size, seed, step)
                    terms, gradients = _gradients(
                        model, data, rows, reference, patched, parameters.values, objective, accumulate
                    )
                    _stop_at_non_finite(terms, gradients, step)
                    now = lr * _decay(schedule, step / steps)
                    record = _record(step, terms, l1, objective)
                    whole = False
                    parameters.update(gradients, now, objective.minimality, betas)
                    l1 = intervention.l1
                    history.append(record | {"minimality": l1, "n_active": intervention.n_active, "lr": now})
                    whole = True
                    bar.set_postfix_str(_summary(history[-1], intervention.n_parameters), refresh=False)
                    bar.update()
                    if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                        save()
            except KeyboardInterrupt:
                if whole:  # within an update the last saved state is the one to resume from
                    save()
                raise
    return FitResult(intervention, history, time.perf_counter() - begun)


def _gradients(
    model: PreTrainedModel, data: EncodedExamples, rows: list[int], reference: Tensor, patched: Patch,
    values: list[nn.Parameter], objective: Objective, accumulate: int,
) -> tuple[dict[str, float], list[Tensor]]:  # fmt: skip
    """The terms (means over prompts, sums over directions) and the gradients of E + λ_F·F."""
    totals: Tensor | None = None
    gradients = [torch.zeros_like(value) for value in values]
    n_directions = len(objective.directions)
    for start in range(0, len(rows), size := -(-len(rows) // accumulate)):
        part = rows[start : start + size]
        direction = torch.tensor(objective.directions, device=data.device, dtype=torch.float32)
        direction = direction.repeat_interleave(len(part))
        patched.strength = direction
        logits = next_token_logits(model, data.batch(part).repeat(n_directions))
        correct, wrong = (ids[part].to(logits.device).repeat(n_directions) for ids in (data.correct, data.wrong))
        losses = ops.intervention_loss(
            logits, reference[part].repeat(n_directions, 1), correct, wrong, direction=direction.to(logits.device),
            margin=objective.margin, exclude_answers=objective.exclude_answers, kl=objective.kl,
        )  # fmt: skip
        effectiveness, faithfulness = (term.sum() / len(rows) for term in losses)
        loss = effectiveness + objective.faithfulness * faithfulness
        for gradient, added in zip(gradients, torch.autograd.grad(loss, values), strict=True):
            gradient += added
        terms = torch.stack([effectiveness, faithfulness]).detach()
        totals = terms if totals is None else totals + terms
    assert totals is not None
    effectiveness, faithfulness = totals.tolist()
    return {"effectiveness": effectiveness, "faithfulness": faithfulness}, gradients


@torch.no_grad()
def _reference(model: PreTrainedModel, data: EncodedExamples, batch_size: int) -> Tensor:
    """The frozen model's next-token logits [N, V], in the model's dtype."""
    kept: Tensor | None = None
    for rows in data.by_length(2 * batch_size):
        logits = next_token_logits(model, data.batch(rows))
        kept = logits.new_empty(len(data), logits.shape[-1]) if kept is None else kept
        kept[rows] = logits
    assert kept is not None
    return kept


def _batch_rows(n_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of a step: consecutive pieces of permutations, one an epoch. A function of its arguments alone."""
    if batch_size >= n_examples:
        return list(range(n_examples))
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position + len(rows), n_examples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n_examples, generator=generator).tolist()
        rows += order[offset : offset + batch_size - len(rows)]
    return rows


def _decay(schedule: Schedule, done: float) -> float:
    """The factor of the learning rate when the share `done` of the steps is behind."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def _stop_at_non_finite(terms: dict[str, float], gradients: list[Tensor], step: int) -> None:
    for name, value in terms.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step}: the {name} term is {value}; the parameters are from the step before"
            )
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise FloatingPointError(f"step {step}: a gradient is not finite; the parameters are from the step before")


def _record(step: int, terms: dict[str, float], l1: float, objective: Objective) -> dict[str, float]:
    """The terms and the loss of one state; `l1` is its ‖α‖₁."""
    loss = terms["effectiveness"] + objective.faithfulness * terms["faithfulness"] + objective.minimality * l1
    return {"step": step, "loss": loss, **terms}


def _summary(record: dict[str, float], n_parameters: int) -> str:
    return (
        f"E {record['effectiveness']:.2f}  F {record['faithfulness']:.2f}  ‖α‖₁ {record['minimality']:.2f}  "
        f"active {record['n_active']}/{n_parameters}"
    )


def _bar(steps: int, done: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, initial=done, desc="fit", disable=not show, unit="step", dynamic_ncols=True)


def _location(intervention: Intervention) -> Location:
    """Where the intervention acts, refused where no example reaches it."""
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    if intervention.location.positions == ():
        raise ValueError(
            "intervention: it acts on generated tokens alone (positions=[], generated=True), and examples have none: "
            "nothing to learn"
        )
    return intervention.location


def _check_counts(**settings: int) -> None:
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def _check_step(lr: float, schedule: str, betas: tuple[float, float], seed: int) -> None:
    if not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: got {lr!r}, expected a positive number")
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule: got {schedule!r}, expected 'constant', 'linear' or 'cosine'")
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not (pair and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas: got {betas!r}, expected two numbers in [0, 1)")
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 1 << 40:
        raise ValueError(f"seed: got {seed!r}, expected an integer below 2^40")
