"""Head scaling in an nnsight trace: in the user's plain PyTorch, and by this package's op.

The edit is a product in both; what a site costs is nnsight's handover of its value. There is nothing to gain, and of
one token the search for the sites is a loss. `model alone` is the pass outside a trace.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=256, dtype=torch.float32, kv_heads=2, inner=1024)


def make(tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    from nnsight import NNsight

    from actscale_fast.integrations.nnsight import steer

    model = random_model(SHAPE, device).to(dtype)
    intervention: Any = af.ActivScalar.for_model(model)
    with torch.no_grad():
        intervention.alpha.copy_(generator()(SHAPE.layers, 1, SHAPE.heads, scale=0.3))
    ids = torch.randint(SHAPE.vocab, (4, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    net = NNsight(model)
    factors = (1 + intervention.alpha.detach()).to(dtype)

    def eager() -> tuple[Tensor, ...]:
        with torch.no_grad():
            with net.trace(ids, use_cache=False):
                for layer in range(SHAPE.layers):
                    projection = net.model.layers[layer].self_attn.o_proj
                    heads = projection.input.unflatten(-1, (SHAPE.heads, -1))
                    projection.input = (heads * factors[layer, :, :, None]).flatten(2)
                logits = net.output.logits.save()
            return (logits,)

    def fused() -> tuple[Tensor, ...]:
        with torch.no_grad():
            with net.trace(ids, use_cache=False):
                steer(net, intervention)
                logits = net.output.logits.save()
            return (logits,)

    def alone() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(ids, use_cache=False).logits,)

    def exact() -> tuple[Tensor, ...]:
        double = copy.deepcopy(random_model(SHAPE, device).to(dtype)).double()
        with ops.use_backend("reference"), torch.no_grad(), af.patch(double, copy.deepcopy(intervention)):
            return (double(ids, use_cache=False).logits,)

    variants = [Variant("eager", eager)]
    variants += [Variant(f"actscale_fast {backend}", fused, backend) for backend in kernel_backends(device)]
    variants.append(Variant("model alone", alone, checked=False))
    n_bytes = 2 * SHAPE.layers * ids.numel() * SHAPE.heads * SHAPE.head_dim * dtype.itemsize
    return Problem(variants, exact, n_bytes, flops=0, dtype=dtype)


def case() -> Case:
    note = "Nothing to gain: nnsight's handover of a site costs more than either product; of one token a loss."
    settings = [
        Setting(
            f"4 × {tokens} tokens, {str(dtype)[6:]}", functools.partial(make, tokens, dtype), note=note,
            quick=tokens == 256 and dtype == torch.float32,
        )
        for tokens, dtype in ((256, torch.float32), (256, torch.bfloat16), (1, torch.float32))
    ]  # fmt: skip
    title = "nnsight: all heads of 4 layers of width 512 scaled in a trace"
    return Case("nnsight", title, settings, bandwidth=False, counted=True)
