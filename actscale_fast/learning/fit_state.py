"""The state of one fit: parameters, their Adam moments, history and checkpoint. It does not depend on the model."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..interventions import Intervention
from . import checkpoint as checkpoints
from .distributed import SINGLE_PROCESS, ProcessGroup
from .fit_settings import FitSettings
from .full_steps import FullSteps
from .objective import Objective

#: Number of steps whose figures may still be on a GPU before the host waits for them.
_AHEAD = 8
_FIGURES = ("effectiveness", "faithfulness", "minimality", "n_active", "moved")


@dataclass(slots=True)
class _Step:
    """A completed step whose figures are being copied from the device."""

    number: int
    lr: float
    figures: Tensor  # float64 [6] on the host: those of _FIGURES, and whether the gradient was finite
    ready: Any  # a CUDA event; None: the figures have arrived
    before: dict[str, Tensor]  # the state before the step


class FitState:
    """The state of one fit: `update` takes a step, `history` records it.

    Args:
        intervention: learned in place; its parameters are the starting point.
        objective, settings: the objective and the settings of the fit.
        rows: the fit's examples among those of the engine.
        checkpoint: a file for the state, or None.
        identity: what else must be the same to resume from that file.
        name: a prefix of error messages.
    """

    def __init__(
        self, intervention: Intervention, objective: Objective, settings: FitSettings, rows: Sequence[int], *,
        checkpoint: str | os.PathLike[str] | None = None, identity: dict[str, Any] | None = None, name: str = "",
    ) -> None:  # fmt: skip
        self.intervention, self.objective, self.settings, self.examples = intervention, objective, settings, list(rows)
        self.checkpoint, self.name = checkpoint, name
        self.identity = settings.to_dict() | (identity or {})
        self.named = {name: value for name, value in intervention.named_parameters() if value.requires_grad}
        if not self.named:
            raise ValueError(f"intervention: {type(intervention).__name__} has no parameters that require a gradient")
        self.values = list(self.named.values())
        self.moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self.values]
        self.counters = [torch.zeros((), dtype=torch.float32, device=value.device) for value in self.values]
        self.history: list[dict[str, float]] = []
        self.taken = 0  # number of steps, including those whose figures have not arrived
        #: λ_M [] where the objective gives a share of λ_max, kept in the checkpoint; NaN: not known yet.
        self._resolved = torch.tensor(torch.nan, dtype=torch.float64, device="cpu")
        #: Where the learning rate is a share; kept in the checkpoint.
        self.full_steps = FullSteps(intervention, self.named if settings.is_relative else {})
        self._l1 = intervention.l1
        self._pending: deque[_Step] = deque()
        self._whole = True  # whether parameters, moments and counters belong to the same step
        self._saved = -1
        self._writes = True  # whether this process writes the checkpoint; the others only read as far as it does

    @property
    def minimality(self) -> float:
        """λ_M; NaN while it is a share of λ_max that is not known yet."""
        objective = self.objective
        return objective.minimality_weight if objective.minimality_share is None else float(self._resolved)

    def resolve_minimality(self, weight: float) -> None:
        """Set λ_M where the objective gives a share."""
        self._resolved.fill_(weight)

    def done(self) -> bool:
        """Whether all steps are taken, or the fit has converged according to `tolerance` and `patience`."""
        return self._ends(self.taken, self.history)

    def _ends(self, taken: int, history: list[dict[str, float]]) -> bool:
        if taken >= self.settings.steps:
            return True
        tolerance, patience = self.settings.tolerance, self.settings.patience
        if tolerance is None or len(history) < patience:
            return False
        return all(record["moved"] <= tolerance for record in history[-patience:])

    def rows(self) -> list[int]:
        """The examples of the next step."""
        return [self.examples[row] for row in self.settings.rows(len(self.examples), self.taken)]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        state: dict[str, Tensor] = {}
        for (name, value), (first, second), step in zip(self.named.items(), self.moments, self.counters, strict=True):
            state |= {name: value.data, f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second, f"{name}.step": step}
        if self.objective.minimality_share is not None:
            state["objective.minimality"] = self._resolved
        state |= {f"{name}.full_step": step for name, step in self.full_steps.of.items()}
        return state

    def update(self, terms: Tensor, gradients: Sequence[Tensor]) -> None:
        """Take a step: Adam and the proximal step of the ℓ1 norm.

        Args:
            terms: effectiveness, faithfulness and the ℓ1 norm of produced scalars [3], before the step.
            gradients: the gradient of E + λ_F·F by each parameter.

        Raises:
            FloatingPointError: a term or gradient of this step (or on a GPU, of one a few steps ago) is not finite. The
                parameters are then those before that step.
        """
        lr = self.settings.rate(self.taken)
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        of_parameters = self.objective.sparsity == "parameters"
        l1 = self.minimality if of_parameters else 0.0
        home = self.values[0].device  # the parts of a composite may be on several devices
        finite = torch.stack([gradient.isfinite().all().to(home) for gradient in gradients]).all()
        self._whole = False
        learned = zip(self.named.items(), gradients, self.moments, self.counters, strict=True)
        for (name, value), gradient, moments, counter in learned:
            full = self.full_steps.of.get(name)
            # Adam's step and threshold depend on the parameter's scale alone, not on the gradient's.
            scaled = value.data if full is None else value.data / full
            ops.proximal_adam_(scaled, gradient, *moments, counter, lr=lr, l1=l1, betas=self.settings.betas)
            if full is not None:
                torch.mul(scaled, full, out=value.data)
        values = torch.cat([value.detach().flatten().to(home) for value in self.values]).double()
        moved = values - torch.cat([before[name].flatten().to(home) for name in self.named])
        effectiveness, faithfulness, produced = terms.to(values.device).double().unbind()
        norm = values.abs().sum() if of_parameters else produced
        figures = torch.stack(
            [effectiveness, faithfulness, norm, values.count_nonzero().double(),
             moved.abs().max(), finite.double()]
        )  # fmt: skip
        self._pending.append(_Step(self.taken, lr, *_to_host(figures), before))
        self.taken += 1
        self._whole = True
        # An early stop must not depend on when a GPU's figures arrive.
        self.read(wait=len(self._pending) > _AHEAD or self.settings.tolerance is not None)

    def read(self, *, wait: bool) -> None:
        """Move the figures that have arrived into the history; with `wait`, all of them."""
        while self._pending and (wait or self._pending[0].ready is None or self._pending[0].ready.query()):
            step = self._pending[0]
            if self.history and self.history[-1]["step"] == step.number:  # an earlier call was interrupted right here
                self._pending.popleft()
                continue
            if step.ready is not None:
                step.ready.synchronize()
            *figures, finite = step.figures.tolist()
            record = dict(zip(_FIGURES, figures, strict=True))
            self._stop_at_non_finite(step, record, bool(finite))
            terms = {name: record[name] for name in ("effectiveness", "faithfulness")}
            objective = self.objective
            loss = terms["effectiveness"] + objective.faithfulness * terms["faithfulness"]
            l1 = self._l1 if objective.sparsity == "parameters" else record["minimality"]
            self.history.append(
                {
                    "step": step.number,
                    "loss": loss + self.minimality * l1,
                    **terms,
                    "minimality": record["minimality"],
                    "n_active": int(record["n_active"]),
                    "moved": record["moved"],
                    "lr": step.lr,
                }
            )
            self._l1 = record["minimality"]
            self._pending.popleft()

    def resume(self, processes: ProcessGroup = SINGLE_PROCESS) -> bool:
        """Continue from the checkpoint if there is one; returns whether there was.

        If several processes share the fit, only rank 0 reads the file, and all start from its state.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another fit, or the processes have different fits.
            OSError: the checkpoint cannot be read, or cannot be written although there are steps left.
        """
        self._writes = processes.is_rank_zero
        state: checkpoints.SavedFit | None = None
        error: ValueError | OSError | None = None
        if self.checkpoint is not None and processes.is_rank_zero:
            try:
                state = checkpoints.load(self.checkpoint, self.identity, self.tensors())
                if state is None or not self._ends(state.step, state.history):
                    checkpoints.check_writable_checkpoint(self.checkpoint, self.tensors())
            except (ValueError, OSError) as found:
                error = found
        resumed = state is not None
        if processes.n_processes > 1:
            state, resumed, error = self._agree(processes, state, error)
        if error is not None:
            raise error
        if state is None:
            return False
        checkpoints.restore(state, self.tensors())
        self.history = state.history
        self.taken = len(state.history)
        self._saved = self.taken if resumed else -1
        self._l1 = self.intervention.l1
        return resumed

    def _agree(
        self, processes: ProcessGroup, state: checkpoints.SavedFit | None, error: ValueError | OSError | None
    ) -> tuple[checkpoints.SavedFit, bool, ValueError | OSError | None]:
        """(the state of rank 0, whether it is from its checkpoint, an error), the same in all processes."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        mine = state or checkpoints.SavedFit(0, tensors, [])
        found = processes.all_gather(
            (self.identity, mine if processes.is_rank_zero else None, state is not None, error)
        )
        identity, first, resumed, error = found[0]
        others = sorted({name for other, *_ in found for name in other if other[name] != identity.get(name)})
        if others and error is None:
            error = ValueError(f"distributed: the processes have different fits: {', '.join(others)} differ")
        return first, resumed, error

    def save(self) -> None:
        """Write the checkpoint, except during an update, where the previous file stays valid."""
        if self.checkpoint is None or not self._whole:
            return
        self.read(wait=True)
        if self._saved != self.taken and self._writes:
            checkpoints.save(
                self.checkpoint, checkpoints.SavedFit(self.taken, self.tensors(), self.history), self.identity
            )
            self._saved = self.taken

    def _stop_at_non_finite(self, step: _Step, record: dict[str, float], gradient_is_finite: bool) -> None:
        bad = next((name for name in ("effectiveness", "faithfulness") if not math.isfinite(record[name])), None)
        if bad is None and gradient_is_finite:
            return
        for name, tensor in self.tensors().items():
            tensor.copy_(step.before[name])
        self._pending.clear()
        self.taken = step.number
        what = f"the {bad} term is {record[bad]}" if bad else "a gradient is not finite"
        where = f"{self.name}: " if self.name else ""
        raise FloatingPointError(f"{where}step {step.number}: {what}; the parameters are from the step before")


def _to_host(figures: Tensor) -> tuple[Tensor, Any]:
    """(the figures on the host, the event after which they have arrived)."""
    if figures.device.type != "cuda":
        return figures.cpu(), None
    there = torch.empty(figures.shape, dtype=figures.dtype, device="cpu", pin_memory=True)
    there.copy_(figures, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event
