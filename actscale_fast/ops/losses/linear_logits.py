"""Logits from hidden states, one chunk of rows at a time, for losses that `linear_softmax` cannot express."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import accumulation_dtype

#: Tensors of [rows, V] that a chunk's logits, their gradient and, with a soft-cap, its steps take at once: of the
#: logits' dtype around a kernel, of the accumulation dtype in plain PyTorch (the latter counted by PyTorch's profiler).
BUFFERS, BUFFERS_SOFTCAP = 3, 6
BUFFERS_PLAIN, BUFFERS_PLAIN_SOFTCAP = 11, 14


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """[R, V], rounded where a transformers model rounds: in hidden's dtype after each step."""
    return of_products(F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)), softcap, logit_scale)


def of_products(products: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """The logits from W·h + b."""
    logits = products if logit_scale == 1.0 else products * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def slices(n_rows: int, step: int) -> Iterator[slice]:
    """Slices of `step` rows; one, empty, where there are no rows.

    All rows at once need no loop, so that torch.compile makes one graph for every number of them up to `step`.
    """
    if n_rows <= step:
        yield slice(None)
        return
    for begin in range(0, n_rows, step):
        yield slice(begin, begin + step)


def chunks(hidden: Tensor, weight: Tensor, softcap: float | None, chunk_bytes: int) -> Iterator[slice]:
    """Slices of rows whose logits, and what their losses make of them, fit into `chunk_bytes`."""
    if backends.serving("intervention_loss", hidden, large=True) == "reference":
        itemsize = accumulation_dtype(hidden.dtype).itemsize
        buffers = BUFFERS_PLAIN if softcap is None else BUFFERS_PLAIN_SOFTCAP
    else:
        itemsize, buffers = hidden.element_size(), BUFFERS if softcap is None else BUFFERS_SOFTCAP
    return slices(hidden.shape[0], max(1, chunk_bytes // (weight.shape[0] * itemsize * buffers)))


def logits_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, chunk_bytes: int
) -> Tensor:
    """[N, V], whole; made as the loss makes its own, chunk by chunk, so that equal rows give equal logits."""
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for rows in chunks(hidden, weight, softcap, chunk_bytes):
        logits[rows] = logits_of(hidden[rows], weight, bias, softcap, logit_scale)
    return logits
