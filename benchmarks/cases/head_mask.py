"""A head mask with its gradient: on the attention's probabilities, as transformers 4 took it, and without making them.

On the probabilities it needs eager attention, [B, H, T, T] of them in memory; ours works under any implementation.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers.models.llama.modeling_llama as llama
from torch import Tensor

from actscale_fast import ops
from actscale_fast.patching.head_mask import head_mask

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=256, dtype=torch.float32, kv_heads=2, inner=1024)


@contextlib.contextmanager
def on_probabilities(mask: Tensor) -> Iterator[None]:
    """Llama's eager attention with its probabilities multiplied after the softmax."""
    attend = llama.eager_attention_forward

    def masked(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
        dropout: float = 0.0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        key, value = (llama.repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if attention_mask is None else scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype) * mask[module.layer_idx, :, None, None]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    llama.eager_attention_forward = masked
    try:
        yield
    finally:
        llama.eager_attention_forward = attend


def run(model: Any, mask: Tensor, ids: Tensor, apply: Callable[[], Any]) -> tuple[Tensor, ...]:
    """Mean negative log-likelihood of the tokens, and its gradient by the mask."""
    with apply():
        logits = model(ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss.detach(), *torch.autograd.grad(loss, mask)


def make(rows: int, tokens: int, device: torch.device) -> Problem:
    model = random_model(SHAPE, device)
    model.set_attn_implementation("sdpa")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(SHAPE.vocab, (rows, tokens), generator=source).to(device)
    mask = (1 + generator()(SHAPE.layers, SHAPE.heads, scale=0.3)).to(device).requires_grad_()

    def exact() -> tuple[Tensor, ...]:
        double, doubled = copy.deepcopy(model).double(), mask.detach().double().requires_grad_()
        with ops.use_backend("reference"):
            return run(double, doubled, ids, functools.partial(head_mask, double, doubled))

    variants = [Variant("eager", lambda: run(eager, mask, ids, lambda: on_probabilities(mask)))]
    for backend in kernel_backends(device):
        variants.append(
            Variant(f"actscale_fast {backend}", lambda: run(model, mask, ids, lambda: head_mask(model, mask)), backend)
        )
    width = SHAPE.heads * SHAPE.head_dim
    return Problem(
        variants, exact, n_bytes=5 * 4 * SHAPE.layers * rows * tokens * width, flops=0,
        terms=lambda: (6.0, 6.0),  # the loss is a difference of logarithms of that size, the gradient a sum of theirs
    )  # fmt: skip


def case() -> Case:
    settings = [
        Setting("4 layers, 8 heads, 2 × 256 tokens", functools.partial(make, 2, 256), quick=True),
        Setting("4 layers, 8 heads, 2 × 1024 tokens", functools.partial(make, 2, 1024)),
    ]
    return Case("head_mask", "head_mask: loss and gradient of the mask", settings, bandwidth=False, counted=True)
