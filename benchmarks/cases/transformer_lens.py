"""TransformerLens: a sweep over all heads by its own function and by this package's, and one edit at `hook_z`.

The stock sweep is one forward pass a head. Here the heads of a layer are rows of a few batches that start at their
layer: about half of the arithmetic, and matrix products over more rows. The edit at `hook_z` is a product in both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=12, heads=12, head_dim=32, vocab=1000, dtype=torch.float32, kv_heads=4, inner=1024)


def bridge(model: Any) -> Any:
    """A bridge around a copy of a Hugging Face model."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    inner = copy.deepcopy(model)
    return build_bridge_from_module(inner, type(inner).__name__, hf_config=inner.config).eval()


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def sweep(prompts: int, tokens: int, device: torch.device) -> Problem:
    from transformer_lens import patching

    from actscale_fast.integrations.transformer_lens import head_patching

    model = random_model(SHAPE, device)
    clean, corrupted = torch.randint(
        SHAPE.vocab, (2, prompts, tokens), generator=torch.Generator().manual_seed(1)
    ).to(device)  # fmt: skip
    lens = bridge(model)
    with torch.no_grad():
        cache = lens.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))[1]

    def stock(lens: Any, cache: Any) -> tuple[Tensor, ...]:
        with torch.no_grad(), mock.patch.object(patching, "tqdm", list):  # no bar
            return (patching.get_act_patch_attn_head_out_all_pos(lens, corrupted, cache, metric),)

    def exact() -> tuple[Tensor, ...]:
        double = bridge(copy.deepcopy(model).double())
        with torch.no_grad():
            wide = double.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))[1]
            # TransformerLens keeps its results in float32, which takes nothing from a check of float32.
            return tuple(result.double() for result in stock(double, wide))

    def terms() -> tuple[float, ...]:
        return (float(model(corrupted).logits[:, -1].abs().max()),)

    variants = [Variant("eager", lambda: stock(lens, cache))]
    for rows in (16, 64):
        call = functools.partial(head_patching, lens, corrupted, cache, metric, rows=rows)
        variants.append(Variant(f"actscale_fast, {rows} rows", functools.partial(one_result, call)))
    width = SHAPE.heads * SHAPE.head_dim
    n_bytes = 4 * SHAPE.layers * (4 * width * width + 3 * width * SHAPE.inner)  # the weights, once
    return Problem(variants, exact, n_bytes, flops=0, terms=terms)


def one_result(call: Callable[[], Tensor]) -> tuple[Tensor]:
    return (call(),)


def edit(tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    from actscale_fast.integrations.transformer_lens import hooks

    model = random_model(SHAPE, device).to(dtype)
    model.set_attn_implementation("eager")
    intervention: Any = af.ActivScalar.for_model(model)
    with torch.no_grad():
        intervention.alpha.copy_(generator()(SHAPE.layers, 1, SHAPE.heads, scale=0.3))
    ids = torch.randint(SHAPE.vocab, (4, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    lens, resources = bridge(model), contextlib.ExitStack()
    factors = (1 + intervention.alpha.detach()).to(dtype)

    def plain(layer: int, z: Tensor, hook: Any) -> Tensor:
        return z * factors[layer, :, :, None]

    by_hand = [(f"blocks.{layer}.attn.hook_z", functools.partial(plain, layer)) for layer in range(SHAPE.layers)]
    found = hooks(lens, intervention)

    def run(fwd_hooks: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (lens.run_with_hooks(ids, fwd_hooks=fwd_hooks, use_cache=False),)

    def exact() -> tuple[Tensor, ...]:
        double = copy.deepcopy(model).double()
        with ops.use_backend("reference"), torch.no_grad(), af.patch(double, copy.deepcopy(intervention)):
            return (double(ids, use_cache=False).logits,)

    variants = [Variant("eager", functools.partial(run, by_hand))]
    variants += [Variant(f"actscale_fast {b}", functools.partial(run, found), b) for b in kernel_backends(device)]
    variants.append(Variant("model alone", functools.partial(run, []), checked=False))
    n_bytes = 2 * SHAPE.layers * ids.numel() * SHAPE.heads * SHAPE.head_dim * dtype.itemsize
    return Problem(variants, exact, n_bytes, flops=0, dtype=dtype, resources=resources)


def case() -> Case:
    note = "Little to gain: TransformerLens' eager attention is most of what the pass moves."
    settings = [
        Setting("sweep over 144 heads, one prompt of 8 tokens", functools.partial(sweep, 1, 8)),
    ]
    settings += [
        Setting(
            f"hook_z of every layer, 4 × 256 tokens, {str(dtype)[6:]}",
            functools.partial(edit, 256, dtype),
            note=note,
            quick=dtype == torch.float32,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    title = "TransformerLens: 12 layers of 12 heads, width 384"
    return Case("transformer_lens", title, settings, bandwidth=False, counted=True, fewest_samples=3)
