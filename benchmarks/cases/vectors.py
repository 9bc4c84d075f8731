"""Steering vectors in a forward pass: as repeng and steering-vectors apply them, and loaded into `af.patch`.

Counted for a layer whose output has X bytes: repeng takes a norm that only `normalize=True` needs, makes a mask, a
product with it and a sum, 9 kernels and 5.0X (10 in bfloat16); steering-vectors makes a mask, a product, a sum and a
copy back, 5 kernels and 4.5X (7.0X in bfloat16, by way of float32); here 1 kernel and 2.0X. `model alone` is the pass
without a vector: what steering costs is the rest. Layers that hand on a copy (2X) show it where a layer's products hide
it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=256, dtype=torch.float32, kv_heads=2, inner=1024)
STRENGTH = -0.7

Given = dict[int, Tensor]
Stock = Callable[[Any, Given, contextlib.ExitStack], tuple[Any, af.SteerVec]]


def repeng(model: Any, given: Given, resources: contextlib.ExitStack) -> tuple[Any, af.SteerVec]:
    """(the model under repeng's control, our vector of the same)."""
    with mock.patch.object(np, "float_", np.float64, create=True):  # repeng 0.4.0 names it; NumPy 2 took it away
        from repeng import ControlModel, ControlVector

    from actscale_fast.integrations.repeng import from_repeng

    vector = ControlVector("llama", {layer: value.numpy() for layer, value in given.items()})
    ours = from_repeng(vector, model)
    wrapped = ControlModel(copy.deepcopy(model), list(given))
    wrapped.set_control(vector, STRENGTH)
    return wrapped, ours


def steering_vectors(model: Any, given: Given, resources: contextlib.ExitStack) -> tuple[Any, af.SteerVec]:
    """(the model with the library's hooks, our vector of the same)."""
    from steering_vectors import SteeringVector

    from actscale_fast.integrations.steering_vectors import from_steering_vectors

    hooked, vector = copy.deepcopy(model), SteeringVector(given)
    on_device = vector.to(device=model.device, dtype=model.dtype)
    resources.enter_context(on_device.apply(hooked, multiplier=STRENGTH))
    return hooked, from_steering_vectors(vector, model)


class Copying(nn.Module):
    """In the place of a decoder layer."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        return hidden_states.clone()


def run(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    # repeng's mask needs a row of position ids for each row of the batch.
    places = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    with torch.no_grad():
        return (model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=1).logits,)


def make(stock: Stock, tokens: int, dtype: torch.dtype, copying: bool, device: torch.device) -> Problem:
    resources = contextlib.ExitStack()
    model, normal = random_model(SHAPE, device).to(dtype), generator()
    if copying:
        model.model.layers = nn.ModuleList(Copying() for _ in range(SHAPE.layers))
    width = SHAPE.heads * SHAPE.head_dim
    given = {layer: normal(width, scale=0.3) for layer in range(SHAPE.layers)}
    ids = torch.randint(SHAPE.vocab, (4, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    theirs, vector = stock(model, given, resources)
    steered = copy.deepcopy(model)
    resources.enter_context(af.patch(steered, vector, strength=STRENGTH))

    def exact() -> tuple[Tensor, ...]:
        double = copy.deepcopy(model).double()
        with ops.use_backend("reference"), af.patch(double, copy.deepcopy(vector), strength=STRENGTH):
            return run(double, ids)

    variants = [Variant("eager", lambda: run(theirs, ids))]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: run(steered, ids), backend))
    variants.append(Variant("model alone", lambda: run(model, ids), checked=False))
    n_bytes = 2 * SHAPE.layers * ids.numel() * width * dtype.itemsize
    return Problem(variants, exact, n_bytes, flops=0, dtype=dtype, resources=resources)


def case() -> Case:
    libraries = {"repeng": repeng, "steering-vectors": steering_vectors}
    sizes = (
        (256, torch.float32, False),
        (256, torch.float32, True),
        (256, torch.bfloat16, True),
        (1, torch.float32, False),
    )
    settings = [
        Setting(
            f"{name}, 4 × {tokens} tokens, {str(dtype)[6:]}{', layers that hand on a copy' * copying}",
            functools.partial(make, stock, tokens, dtype, copying),
            quick=copying and dtype == torch.float32,
        )
        for name, stock in libraries.items()
        if importlib.util.find_spec(name.replace("-", "_"))
        for tokens, dtype, copying in sizes
    ]
    title = "A vector on each of 4 layers of width 512, one forward pass"
    return Case("vectors", title, settings, bandwidth=False, counted=True)
