"""What the tests of sweeps share: a short sweep over fits of the tiny model."""

from __future__ import annotations

from typing import Any

import tiny
from fit_cases import conflicts

import actscale_fast as af

OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.7, minimality=0.1)
SETTINGS: dict[str, Any] = {"steps": 6, "lr": 0.05, "batch_size": 4, "progress": False}


def run_sweep(grid: Any, model: Any = None, examples: Any = None, **options: Any) -> af.SweepResult:
    model, examples = model or tiny.llama(), examples or conflicts(7)
    return af.sweep(model, tiny.tokenizer(), examples, grid, OBJECTIVE, **SETTINGS | options)
