"""The demo's settings, in one place: what `actscale-fast demo` learns with, and the defaults of `actscale-fast fit`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Chosen for SmolLM2-135M-Instruct on two cores; any other model takes them as a starting point."""

    n_train: int = 128
    n_test: int = 96
    n_templates: int = 1  # the first of the task's: on the longer ones a step takes up to twice as long
    steps: int = 40
    batch_size: int = 16
    lr: float = 0.05
    margin: float = 3.5
    faithfulness: float = 1.0
    minimality: float = 0.1
    seed: int = 0
    max_new_tokens: int = 10


DEMO = DemoSettings()
