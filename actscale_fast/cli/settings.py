"""What `actscale-fast demo` learns from and shows; all else it takes from the defaults of `fit` and `Objective`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Chosen for SmolLM2-135M-Instruct on two cores; any other model takes them as a starting point."""

    n_train: int = 192
    n_test: int = 96
    n_templates: int = 1  # the first of the task's: on the longer ones a step takes up to twice as long
    max_new_tokens: int = 10


DEMO = DemoSettings()
