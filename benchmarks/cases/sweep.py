"""One step of many fits of one model: all of them together, one after another by this package, and plain.

The fits differ in their prompts (a seed each) and in the weight of the ℓ1 norm, as the points of a grid do, and every
one of them is at scalars of its own. The times are those of a step of all fits; every variant runs all of them. Asked
for by name; takes minutes.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.fit_settings import FitSettings

from ..case import GPU_ONLY, Case, Problem, Setting, Variant, generator
from ..models import GPT2_SMALL, RandomPrompts, Shape, conflicts, random_model
from ..plain import Exact, PlainFits
from ..steps import Work, engine_variants
from .fit import least_bytes, operations

#: The weights of the ℓ1 norm in the grid; the rest of it are seeds.
MINIMALITY = (0.03, 0.06, 0.12, 0.24)
EXAMPLES = 64


def demo(fits: int, prompts: int, device: torch.device) -> Problem:
    """A grid on the demo model."""
    model, data = conflicts(EXAMPLES, device)
    return problem(grid(model, data, fits, prompts, 0.05))


def random(shape: Shape, fits: int, prompts: int, tokens: int, device: torch.device) -> Problem:
    """A grid on a random model."""
    data = RandomPrompts(max(EXAMPLES, 2 * prompts), tokens, shape.vocab, device)
    return problem(grid(random_model(shape, device), data, fits, prompts, 1.0))


def grid(model: Any, data: EncodedExamples, fits: int, prompts: int, scale: float) -> Work:
    """One step of `fits` points: each seed with every λ_M; scalars of this scale."""
    seeds = [FitSettings(seed=seed, batch_size=prompts) for seed in range(-(-fits // len(MINIMALITY)))]
    rows = [settings.rows(len(data), 0) for settings in seeds for _ in MINIMALITY][:fits]
    minimality = [weight for _ in seeds for weight in MINIMALITY][:fits]
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    starts = generator()(fits, n_layers, 1, n_heads, scale=scale)
    return Work(model, data, rows, starts, minimality, tuple(range(n_layers)))


def problem(work: Work) -> Problem:
    resources = contextlib.ExitStack()
    exact = Exact(work)
    variants = [
        Variant("eager", PlainFits(work)),
        *engine_variants(work, resources, ", one after another"),
        *engine_variants(work, resources, ", all together", together=True),
    ]
    return Problem(
        variants, exact.results, n_bytes=least_bytes(work), flops=operations(work), terms=exact.terms,
        dtype=work.model.dtype, resources=resources,
    )  # fmt: skip


def case() -> Case:
    settings = [
        Setting("2 fits, SmolLM2-135M, 16 prompts each", functools.partial(demo, 2, 16), quick=True),
        Setting("16 fits, SmolLM2-135M, 16 prompts each", functools.partial(demo, 16, 16)),
        Setting(
            "32 fits, GPT-2 small's size (random weights), 32 prompts × 20 tokens each",
            functools.partial(random, GPT2_SMALL, 32, 32, 20),
            devices=GPU_ONLY,
        ),
    ]
    return Case(
        "sweep", "One step of many fits", settings, unit="s", bandwidth=False, clocks=("step", "call"), fewest_samples=3
    )
