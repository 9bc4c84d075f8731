"""The projection's input of one layer in a server's step: each token scaled by the scalars of its request."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from actscale_fast.architectures.location import ModelFingerprint
from actscale_fast.integrations.serving import ScalarTable

from ..case import Case, Problem, Setting, Variant, compiled, generator, kernel_backends

HEADS, WIDTH, SLOTS = 32, 128, 8


def plain(x: Tensor, alpha: Tensor, index: Tensor) -> Tensor:
    heads = x.view(-1, HEADS, WIDTH)
    return (heads * (1 + alpha[index, 0]).to(x.dtype)[..., None]).view(x.shape)


def make(tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    table = ScalarTable(ModelFingerprint("llama", 1, HEADS, WIDTH, HEADS * WIDTH), slots=SLOTS, device=device)
    table.alpha[:, 1:] = generator()(1, SLOTS - 1, 1, HEADS, scale=0.3)
    table.assign([i % SLOTS for i in range(tokens)], [1] * tokens)
    x, index = generator(1)(tokens, HEADS * WIDTH).to(device, dtype), table.index[:tokens]
    fast = compiled(plain)
    variants = [
        Variant("eager", lambda: (plain(x, table.alpha[0], index),)),
        Variant("torch.compile", lambda: (fast(x, table.alpha[0], index),)),
    ]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", lambda: (table.scale(x, 0),), backend))
    return Problem(
        variants, lambda: (plain(x.double(), table.alpha[0].double(), index),),
        n_bytes=2 * x.numel() * x.element_size(), flops=x.numel(),
    )  # fmt: skip


def case() -> Case:
    settings = [
        Setting(f"{tokens} tokens, {HEADS} heads of {WIDTH}, {str(dtype)[6:]}", functools.partial(make, tokens, dtype))
        for tokens in (32, 2048)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    settings[0] = Setting(settings[0].label, settings[0].make, quick=True)
    return Case("serving", "ScalarTable: one layer of a server's step", settings, unit="us", counted=True)
