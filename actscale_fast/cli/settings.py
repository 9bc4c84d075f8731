"""The demo's settings, in one place: what `actscale-fast demo` learns with, and the defaults of `actscale-fast fit`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Chosen for SmolLM2-135M-Instruct on two cores; any other model takes them as a starting point."""

    n_train: int = 256
    n_test: int = 128
    templates: tuple[str, ...] | None = None  # None: all of the task's
    steps: int = 50
    batch_size: int = 16
    lr: float = 0.03
    margin: float = 4.0
    faithfulness: float = 1.0
    minimality: float = 0.01
    seed: int = 0
    max_new_tokens: int = 10


DEMO = DemoSettings()
