"""The settings of a fit's steps, checked once: counts, learning rate, order of the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from .. import defaults
from .._checks import check_counts, finite_number, is_integer, share_of
from ..interventions import Intervention

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """The arguments of `fit` that determine its steps; see there."""

    steps: int = defaults.STEPS
    lr: float | str = defaults.LR
    batch_size: int = defaults.BATCH_SIZE
    seed: int = defaults.SEED
    schedule: Schedule = defaults.SCHEDULE
    betas: tuple[float, float] = (0.9, 0.99)
    tolerance: float | None = None
    patience: int = defaults.PATIENCE

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, patience=self.patience)
        rate = share_of(self.lr) if isinstance(self.lr, str) else finite_number(self.lr)
        if rate is None or rate <= 0:
            expected = "a positive number, or a share of the activation's size such as '5%', at most '100%'"
            raise ValueError(f"lr: got {self.lr!r}, expected {expected}")
        lr = "".join(self.lr.split()) if isinstance(self.lr, str) else rate
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: got {self.schedule!r}, expected 'constant', 'linear' or 'cosine'")
        betas = [finite_number(beta) for beta in self.betas] if isinstance(self.betas, Sequence) else []
        if len(betas) != 2 or not all(beta is not None and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {self.betas!r}, expected two numbers in [0, 1)")
        if not is_integer(self.seed) or abs(int(self.seed)) >= 1 << 40:
            raise ValueError(f"seed: got {self.seed!r}, expected an integer below 2^40")
        for name in ("steps", "batch_size", "patience", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        tolerance = finite_number(self.tolerance)
        if self.tolerance is not None and (tolerance is None or tolerance < 0):
            raise ValueError(f"tolerance: got {self.tolerance!r}, expected None or a number >= 0")
        for name, value in (("lr", lr), ("betas", tuple(betas)), ("tolerance", tolerance)):
            object.__setattr__(self, name, value)

    @property
    def is_relative(self) -> bool:
        """Whether the learning rate is a share of the activation's size."""
        return isinstance(self.lr, str)

    @property
    def full_rate(self) -> float:
        """The learning rate before any decay: in the parameters' units, or a share of the activation's size."""
        share = share_of(self.lr) if isinstance(self.lr, str) else self.lr
        assert share is not None
        return share

    def rate(self, step: int) -> float:
        """The learning rate of a step, in the same units."""
        done, rate = step / self.steps, self.full_rate
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * done))
        return rate * (1 - done) if self.schedule == "linear" else rate

    def rows(self, n_examples: int, step: int) -> list[int]:
        """The rows of a step: consecutive pieces of one permutation per epoch."""
        if self.batch_size >= n_examples:
            return list(range(n_examples))
        rows: list[int] = []
        position = step * self.batch_size
        while len(rows) < self.batch_size:
            epoch, offset = divmod(position + len(rows), n_examples)
            rows += self._order(n_examples, epoch)[offset : offset + self.batch_size - len(rows)]
        return rows

    def first_uses(self, n_examples: int) -> list[int]:
        """The rows that the steps use, in the order of their first use."""
        order = list(range(n_examples)) if self.batch_size >= n_examples else self._order(n_examples, 0)
        return order[: self.steps * self.batch_size]

    def _order(self, n_examples: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(n_examples, generator=generator, device="cpu").tolist()
        return order

    def for_intervention(self, intervention: Intervention) -> FitSettings:
        """These settings; a share as the number that it is where parameters are factors of activations already."""
        if self.is_relative and not any(single.activation_power for single in intervention.singles):
            return replace(self, lr=self.full_rate)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self) | {"betas": list(self.betas)}
