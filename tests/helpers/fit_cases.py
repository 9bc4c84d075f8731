"""What the tests of fits share: prompts, a short fit of the tiny model, and the same fit in a process of its own."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open

import actscale_fast as af
from actscale_fast.learning.fit_settings import FitSettings

OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.5, minimality=0.05)
CAPITALS = ["Paris", "Berlin", "Rome", "Madrid", "Oslo"]


def conflicts(n: int, seed: int = 0) -> list[af.Example]:
    """Prompts of differing lengths, so that batches are padded."""
    generator, examples = random.Random(seed), []
    for _ in range(n):
        correct, wrong = generator.sample(CAPITALS, 2)
        words = ["Q"] * generator.randrange(3) + ["The capital of", generator.choice("ABC"), "is", wrong, "answer"]
        examples.append(af.Example(" ".join(words), " " + correct, " " + wrong))
    return examples


def run(model: Any, examples: list[af.Example], objective: af.Objective | None = None, **options: Any) -> af.FitResult:
    settings: dict[str, Any] = {"steps": 6, "lr": 0.05, "batch_size": 4, "seed": 3, "progress": False} | options
    scalars = options.pop("intervention", None) or af.ActivScalar.for_model(model)
    settings.pop("intervention", None)
    return af.fit(model, tiny.tokenizer(), examples, scalars, objective, **settings)


def whole_fit(**options: Any) -> af.FitResult:
    """Twelve steps, which the tests interrupt and resume."""
    return run(tiny.llama(), conflicts(9), OBJECTIVE, steps=12, **options)


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Within it a fit is interrupted before this step; the interruption must come, and ends here."""
    rows = FitSettings.rows

    def interrupted(self: FitSettings, n: int, current: int) -> list[int]:
        if current == step:
            raise KeyboardInterrupt
        return rows(self, n, current)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(FitSettings, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def steps_in(path: Path) -> int:
    """The number of steps of the fit saved in this checkpoint."""
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


SCRIPT = """
import sys
sys.path[:0] = [{helpers!r}]
import signal, time, tiny, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
import actscale_fast as af
from actscale_fast.learning.fit_state import FitState
from fit_cases import conflicts

torch.set_num_threads({threads})
update = FitState.update

def slowly(self, *given):
    update(self, *given)
    print(self.taken, flush=True)
    time.sleep(0.1)

FitState.update = slowly
model = tiny.llama()
scalars = af.ActivScalar.for_model(model)
af.fit(model, tiny.tokenizer(), conflicts(9), scalars, af.Objective(margin=2.0, faithfulness=0.5, minimality=0.05),
       steps=12, lr=0.05, batch_size=4, seed=3, progress=False, checkpoint={path!r}, checkpoint_every=2)
"""


def start_fit(path: Path, threads: int = 1) -> subprocess.Popen[str]:
    """`whole_fit` with checkpoints in a process of its own; it prints the number of each step and pauses after it."""
    code = SCRIPT.format(helpers=str(Path(__file__).parent), threads=threads, path=str(path))
    # -P: the installed package with its kernels, not the checkout
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
