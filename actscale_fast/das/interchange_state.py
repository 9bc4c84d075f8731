"""The settings of an interchange's fit, and its state: parameters, optimizer, history and checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import is_finite
from ..learning import checkpoint as checkpoints
from ..learning.fit_settings import FitSettings
from .boundless_das import LEAST_BOUNDARY, BoundlessDAS
from .pairs import Pairs

_FIGURES = ("loss", "cross_entropy", "accuracy", "boundary")


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a fit, checked."""

    steps: FitSettings
    accumulate: int
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

    def to_dict(self) -> dict[str, Any]:
        """All settings, for JSON."""
        own = ("accumulate", "boundary_lr", "boundary_weight", "warmup")
        return self.steps.to_dict() | {name: getattr(self, name) for name in own} | {"temperature": [*self.temperature]}


class InterchangeState:
    """The state of a fit: parameters, Adam's moments, history and checkpoint."""

    def __init__(
        self, das: BoundlessDAS, plan: Plan, checkpoint: str | os.PathLike[str] | None, identity: dict[str, Any]
    ) -> None:
        self.das, self.plan, self.checkpoint, self.identity = das, plan, checkpoint, identity
        self.named = dict(das.named_parameters())
        rotations = [value for name, value in self.named.items() if name != "boundary"]
        self.adam = torch.optim.Adam(
            [{"params": rotations, "lr": plan.steps.full_rate}, {"params": [das.boundary], "lr": plan.boundary_lr}]
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
        size = math.ceil(len(rows) / plan.accumulate)
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
        rates = plan.steps.full_rate, plan.boundary_lr
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
        *values, all_finite = torch.cat([figures, finite.all()[None].to(figures)]).tolist()
        found = dict(zip(_FIGURES, values, strict=True))
        if not all_finite:
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
