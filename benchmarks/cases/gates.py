"""Gates on heads, one step's loss and gradient: causal head gating and JoLA, with hooks and PyTorch, and on our ops.

`eager` of causal head gating makes the logits of all tokens, as a causal language model returns them; ours makes those
of the tokens with labels. `eager, labelled logits` does that too: what is left between the two is the gates alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.architectures.layout import layout
from actscale_fast.integrations.causal_head_gating import gated_nll, scored
from actscale_fast.integrations.jola import JoLA

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..head_gating import CLIP, LAMBDA, HeadGating
from ..models import RandomPrompts, Shape, random_model
from ..steps import Work

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=8192, dtype=torch.float32, kv_heads=2, inner=1024)


def work(prompts: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Work:
    model = random_model(SHAPE, device).to(dtype)
    data = RandomPrompts(prompts, tokens, SHAPE.vocab, device)
    starts = torch.zeros(1, SHAPE.layers, 1, SHAPE.heads)
    return Work(model, data, [list(range(prompts))], starts, [0.0], tuple(range(SHAPE.layers)))


def with_gradient(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, ...]:
    found = loss()
    return found.detach(), *torch.autograd.grad(found, parameters)


def head_gating(prompts: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    given, resources = work(prompts, tokens, dtype, device), contextlib.ExitStack()
    theta = (2 * generator()(SHAPE.layers, SHAPE.heads)).to(device).requires_grad_()
    plain = HeadGating(given)
    plain.gates = theta
    labelled = copy.copy(plain)
    labelled.arguments = {**plain.arguments, "logits_to_keep": 2}
    batch: dict[str, Any] = {key: value for key, value in plain.arguments.items() if key != "use_cache"}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -1] = plain.target
    gated = copy.deepcopy(given.model)
    handle = resources.enter_context(af.head_mask(gated, theta.detach().sigmoid()))

    columns = scored(batch)

    def ours() -> Tensor:
        pressure = LAMBDA * theta.clamp(-CLIP, CLIP).sum()
        return gated_nll(gated, handle, theta.sigmoid(), batch, columns) - pressure

    def exact() -> tuple[Tensor, ...]:
        double = copy.copy(plain)
        double.model = copy.deepcopy(given.model).double()
        double.projections = layout(double.model).projections
        double.gates = theta.detach().double().requires_grad_()
        return with_gradient(double.loss, [double.gates])

    variants = [
        Variant("eager", lambda: with_gradient(plain.loss, [theta])),
        Variant("eager, labelled logits", lambda: with_gradient(labelled.loss, [theta])),
    ]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: with_gradient(ours, [theta]), backend))
    return Problem(variants, exact, least(prompts, tokens + 1, dtype), 0, sizes, dtype, resources)


def plain_jola(jola: JoLA, model: Any, parameters: list[Tensor], ids: Tensor, target: Tensor) -> Tensor:
    """The mean loss of the next token, from hooks that scale and shift the heads."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            a, v, gate_a, gate_v = (parameter[layer, 0] for parameter in parameters)
            heads = args[0].unflatten(-1, (SHAPE.heads, SHAPE.head_dim))
            scale = (1 + jola.gate(gate_a)[:, None] * a).to(heads.dtype)
            return ((heads * scale + (jola.gate(gate_v)[:, None] * v).to(heads.dtype)).flatten(-2),)

        return edit

    handles = [m.register_forward_pre_hook(hook(layer)) for layer, m in enumerate(layout(model).projections)]
    try:
        return next_token_loss(model, ids, target)
    finally:
        for handle in handles:
            handle.remove()


def next_token_loss(model: Any, ids: Tensor, target: Tensor) -> Tensor:
    logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def jola(prompts: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    given, resources, normal = work(prompts, tokens, dtype, device), contextlib.ExitStack(), generator()
    model, ids, target = given.model, given.data.batch(given.rows[0]).input_ids, given.data.correct
    intervention = JoLA.for_model(model)
    with torch.no_grad():
        for parameter in intervention.parameters():
            parameter.copy_(normal(*parameter.shape, scale=0.5))
    parameters: list[Tensor] = list(intervention.parameters())
    patched = copy.deepcopy(model)
    resources.enter_context(af.patch(patched, intervention))

    def exact() -> tuple[Tensor, ...]:
        double = copy.deepcopy(model).double()
        doubled = [parameter.detach().double().requires_grad_() for parameter in parameters]
        with ops.use_backend("reference"):
            return with_gradient(lambda: plain_jola(intervention, double, doubled, ids, target), doubled)

    run = functools.partial(plain_jola, intervention, model, parameters, ids, target)
    variants = [Variant("eager", lambda: with_gradient(run, parameters))]
    loss = functools.partial(next_token_loss, patched, ids, target)
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: with_gradient(loss, parameters), backend))
    return Problem(variants, exact, least(prompts, tokens, dtype), 0, None, dtype, resources)


def least(rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the gates alone: x and y forward, dy, x and dx back."""
    return 5 * SHAPE.layers * rows * tokens * SHAPE.heads * SHAPE.head_dim * dtype.itemsize


def sizes() -> tuple[float, ...]:
    """The loss is a difference of logarithms of that size; a gate's gradient has λ as one of two terms."""
    return 9.0, LAMBDA


def case() -> Case:
    settings = [
        Setting(f"{name}, 16 × 64 tokens, {str(dtype)[6:]}", functools.partial(make, 16, 64, dtype), quick=quick)
        for name, make in (("causal head gating", head_gating), ("JoLA", jola))
        for dtype, quick in ((torch.float32, True), (torch.bfloat16, False))
    ]
    title = "Gates on the heads of 4 layers: loss and gradient of a step"
    return Case("gates", title, settings, bandwidth=False, counted=True)
