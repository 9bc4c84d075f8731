"""How a fit steps: counts, rates, the order of the examples; checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .. import defaults

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """The arguments of `fit` that say how it steps; see there."""

    steps: int = defaults.STEPS
    lr: float = defaults.LR
    batch_size: int = defaults.BATCH_SIZE
    seed: int = defaults.SEED
    schedule: Schedule = defaults.SCHEDULE
    betas: tuple[float, float] = (0.9, 0.99)
    tolerance: float | None = None
    patience: int = defaults.PATIENCE

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, patience=self.patience)
        if not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"lr: got {self.lr!r}, expected a positive number")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: got {self.schedule!r}, expected 'constant', 'linear' or 'cosine'")
        pair = isinstance(self.betas, Sequence) and len(self.betas) == 2
        if not (pair and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas: got {self.betas!r}, expected two numbers in [0, 1)")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or abs(self.seed) >= 1 << 40:
            raise ValueError(f"seed: got {self.seed!r}, expected an integer below 2^40")
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance: got {self.tolerance!r}, expected None or a number >= 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        done = step / self.steps
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr

    def rows(self, n_examples: int, step: int) -> list[int]:
        """The rows of a step: consecutive pieces of permutations, one an epoch."""
        if self.batch_size >= n_examples:
            return list(range(n_examples))
        rows: list[int] = []
        position = step * self.batch_size
        while len(rows) < self.batch_size:
            epoch, offset = divmod(position + len(rows), n_examples)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(n_examples, generator=generator, device="cpu").tolist()
            rows += order[offset : offset + self.batch_size - len(rows)]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return asdict(self) | {"betas": list(self.betas)}


def check_counts(**settings: int) -> None:
    """ValueError that names the first setting which is not a positive integer."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def check_bytes(**budgets: int | None) -> None:
    """ValueError that names the first budget which is no integer >= 0; None stands for the default."""
    for name, value in budgets.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name}: got {value!r}, expected an integer that is at least 0")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
