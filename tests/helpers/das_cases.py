"""What the tests of interchange interventions share: the derivation by hand, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actscale_fast.das.boundless_das import BoundlessDAS

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
HEADS = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj"}


def exact(das: BoundlessDAS) -> BoundlessDAS:
    """The interchange in float64, its rotations orthogonal to float64's last digits."""
    das = das.double()
    for rotation in das.rotations:
        free = rotation.free.detach().clone()
        rotation.set(torch.linalg.qr(rotation.base)[0])
        with torch.no_grad():
            rotation.free.copy_(free)
    return das


def by_hand(das: BoundlessDAS, layer: int, slot: int, head: int) -> tuple[Tensor, Tensor]:
    """(R [D, D], m [D]) from the parameters: the Cayley map through an inverse, the mask coordinate by coordinate."""
    rotation, n_heads, width = das.rotations[layer], das.location.n_heads, das.location.width
    free, base = rotation.free[slot * n_heads + head], rotation.base[slot * n_heads + head]
    skew = torch.tril(free, -1) - torch.tril(free, -1).T
    eye = torch.eye(width, dtype=free.dtype)
    matrix = base @ torch.linalg.inv(eye - skew / 2) @ (eye + skew / 2)
    end, t = das.boundary[layer, slot, head] * width, float(das.temperature)
    mask = [
        1 / (1 + torch.exp(torch.tensor(-i / t, dtype=torch.float64))) / (1 + torch.exp((i - end) / t))
        for i in range(width)
    ]
    return matrix, torch.stack(mask).to(free.dtype)


@contextlib.contextmanager
def hooked(
    model: nn.Module, kind: str, das: BoundlessDAS, source: Tensor, columns: list[list[int]], beta: float = 1.0
) -> Iterator[None]:
    """Hooks that replace h by h + β(Rᵀ((1−m)⊙Rh + m⊙Rs) − h), token by token and head by head."""
    n_heads, width = das.location.n_heads, das.location.width

    def edited(x: Tensor, layer: int) -> Tensor:
        given = x.unflatten(-1, (n_heads, width))
        x = given.clone()
        for row, places in enumerate(columns):
            for slot, column in enumerate(places):
                for head in range(n_heads):
                    if column < x.shape[1]:
                        rotation, mask = by_hand(das, layer, slot, head)
                        h, s = given[row, column, head], source[row, layer, slot, head]
                        out = rotation.T @ ((1 - mask) * (rotation @ h) + mask * (rotation @ s))
                        x[row, column, head] = h + beta * (out - h)
        return x.flatten(-2)

    handles = []
    for index, layer in enumerate(das.location.layers):
        block = model.get_submodule(BLOCKS[kind])[layer]  # type: ignore[index]
        if das.location.site == "head":
            part = block.get_submodule(HEADS[kind])
            handles.append(part.register_forward_pre_hook(lambda _, inputs, i=index: (edited(inputs[0], i),)))
        else:

            def after(_: Any, __: Any, output: Any, i: int = index) -> Any:
                return (edited(output[0], i), *output[1:]) if isinstance(output, tuple) else edited(output, i)

            handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
