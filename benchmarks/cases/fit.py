"""One step of a fit, end to end: the prompts of a batch under both directions, the losses, their gradient, the update.

Baselines: `eager` is what one writes with only PyTorch and transformers (hooks on the output projections, one forward
pass per direction with the logits of all tokens, F.kl_div, Adam), and the same with both directions in one batch. The
engine of `fit` is open while the clock runs, as in a fit: what it keeps between steps was made before. This case runs
only if it is named, and takes minutes.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from ..case import GPU_ONLY, Case, Problem, Setting, Variant, generator, kernel_backends
from ..head_gating import HeadGating
from ..models import GPT2_SMALL, LLAMA_3_8B, RandomPrompts, Shape, conflicts, random_model
from ..plain import Exact, PlainFits
from ..steps import Work, engine_variants, losses, products

PROMPTS = 16
GATING = "causal head gating is another objective: one direction and full-vocabulary logits, its update as published"
PRODUCTS = (
    "matrix products alone: PyTorch's own of the padded batch under both directions, forward and one back; ours packs "
    "prompts into rows, with no padding and their common beginning once"
)


def demo(
    device: torch.device, *, tokens: int | None = None, layers: range | None = None, last_only: bool = False,
    beside: bool = False,
) -> Problem:  # fmt: skip
    """A step on the demo model."""
    model, data = conflicts(PROMPTS, device, tokens=tokens)
    chosen = tuple(range(model.config.num_hidden_layers) if layers is None else layers)
    starts = generator()(1, len(chosen), 1, model.config.num_attention_heads, scale=0.05)
    return problem(Work(model, data, [list(range(PROMPTS))], starts, [0.12], chosen, last_only), beside=beside)


def random(shape: Shape, prompts: int, tokens: int, device: torch.device) -> Problem:
    """A step on a random model, with the other work that it is compared with."""
    model = random_model(shape, device)
    data = RandomPrompts(prompts, tokens, shape.vocab, device)
    starts = generator()(1, shape.layers, 1, shape.heads)  # random heads matter little: not 0.05
    work = Work(model, data, [list(range(prompts))], starts, [0.12], tuple(range(shape.layers)))
    return problem(work, beside=True)


def problem(work: Work, *, beside: bool) -> Problem:
    """The variants of the step; `beside`: also other work that it is compared with."""
    device, resources = work.data.device, contextlib.ExitStack()
    exact = Exact(work)
    variants = [
        Variant("eager", PlainFits(work)),
        Variant("eager, directions in one batch", PlainFits(work, stacked=True)),
    ]
    variants += engine_variants(work, resources)
    if beside:
        variants.append(Variant("matrix products alone", products(work), checked=False))
        backend = next(kernel_backends(device), None)
        variants.append(Variant("our losses alone", losses(work), backend, checked=False))
        variants.append(Variant("causal head gating", HeadGating(work), checked=False))
    return Problem(
        variants, exact.results, n_bytes=least_bytes(work), flops=operations(work), terms=exact.terms,
        dtype=work.model.dtype, resources=resources,
    )  # fmt: skip


def least_bytes(work: Work) -> int:
    """Each weight except the embeddings is read once forward and once backward, for all fits together."""
    return 2 * sum(p.numel() * p.element_size() for name, p in work.model.named_parameters() if "embed" not in name)


def operations(work: Work) -> int:
    """Operations of a plain step: two per weight and token forward, and as many back to the inputs."""
    return 4 * work.tokens * sum(p.numel() for name, p in work.model.named_parameters() if "embed" not in name)


def case() -> Case:
    partial = functools.partial
    settings = [
        Setting(
            "SmolLM2-135M, all heads, 16 prompts",
            partial(demo, beside=True),
            note=f"{PRODUCTS}; {GATING}",
            quick=True,
        ),
        Setting("last position only, 48-token prompts", partial(demo, tokens=48, last_only=True)),
        Setting("upper half of the layers", partial(demo, layers=range(15, 30))),
        Setting(
            "GPT-2 small's size (random weights), 32 prompts × 20 tokens",
            partial(random, GPT2_SMALL, 32, 20),
            devices=GPU_ONLY,
        ),
        Setting(
            "Llama-3-8B's shape (random weights), bfloat16, 32 prompts × 64 tokens",
            partial(random, LLAMA_3_8B, 32, 64),
            devices=GPU_ONLY,
        ),
    ]
    return Case(
        "fit",
        "One step of a fit, end to end",
        settings,
        unit="s",
        bandwidth=False,
        clocks=("step", "call"),
        fewest_samples=5,
    )
