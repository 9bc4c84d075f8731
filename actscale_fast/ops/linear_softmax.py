"""The softmax over a vocabulary and its mean of the rows of W, from hidden states: attention with K = V = W.

    z = s·(W·h + b),  q = softmax(z) over the kept columns:  log Σ exp(z),  Wᵀq,  q·b  and z at the two answers

The C++ backend does it in one read of W (csrc/linear_softmax.h). Everywhere else it goes over chunks of rows: a matrix
product into float32 logits, one kernel that turns them into weights e^{z − max}, and a second matrix product. Weights
are at most 1 and divided by their sum at the end, so that float16 holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .linear_logits import slices
from .reference import accumulation_dtype
from .registry import backend_of, define, is_eager

#: Extra memory of one call, at most (at least one row of logits).
CHUNK_BYTES = 256 << 20
#: Columns whose products are added up in one chain of float32 additions, on a CPU and on a GPU (there not measured).
#: V = 50257, d = 5, fp32, PyTorch on a CPU: h·mean is off by 1.5e-4 in one chain, by 1.4e-5 in chains of 4096, by 3e-6
#: in chains of 1024; at 32 rows of d = 576 it makes no difference.
COLUMNS, COLUMNS_ON_GPU = 1024, 16384

#: (raw products [R, V], bias, correct, wrong, exclude_answers, logit_scale, dtype of the weights e) ->
#: (log_sum, e [R, V], Σ e, Σ e·log e, Σ e·bias, answers [R, 2]); the sums [R] in float64. May overwrite the products.
SoftmaxRows = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def softmax_rows(
    products: Tensor,
    bias: Tensor | None,
    correct: Tensor | None,
    wrong: Tensor | None,
    exclude_answers: bool,
    logit_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`SoftmaxRows` in plain PyTorch; an id out of range makes its row NaN."""
    z = products if bias is None else products.add_(bias)
    answers = z.new_empty(0, 2)
    if correct is not None and wrong is not None:
        columns = torch.stack([correct, wrong], -1)  # [R, 2]
        known = ((columns >= 0) & (columns < z.shape[1])).all(-1, keepdim=True)
        columns = columns.clamp(0, z.shape[1] - 1)
        answers = (logit_scale * z.gather(1, columns)).masked_fill(~known, torch.nan)
        if exclude_answers:
            z = z.scatter_(1, columns, -torch.inf)
        z = z.add_(torch.where(known, 0.0, torch.nan))
    largest = z.amax(1, keepdim=True)
    powers = z.sub_(largest.masked_fill(largest == -torch.inf, 0.0)).mul_(logit_scale)
    weights = powers.exp()
    total = weights.sum(1, dtype=torch.float64)
    spread = powers.masked_fill_(weights == 0, 0.0).mul_(weights).sum(1, dtype=torch.float64)
    log_sum = logit_scale * largest[:, 0].double() + total.log()
    in_bias = torch.zeros_like(total)
    if bias is not None:
        in_bias = (weights * bias).masked_fill_(weights == 0, 0.0).sum(1, dtype=torch.float64)
    return log_sum, weights.to(dtype), total, spread, in_bias, answers


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correct: Tensor | None,
    wrong: Tensor | None,
    exclude_answers: bool,
    logit_scale: float,
    chunk_bytes: int,
    rows: SoftmaxRows = softmax_rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`interface.BackendModule.linear_softmax` over chunks of rows whose logits and weights fit into `chunk_bytes`."""
    acc = accumulation_dtype(hidden.dtype)
    narrow = weight.dtype != acc
    step = max(1, chunk_bytes // (weight.shape[0] * (acc.itemsize + (weight.dtype.itemsize if narrow else 0))))
    parts = []
    for here in slices(hidden.shape[0], step):
        ids = (None, None) if correct is None or wrong is None else (correct[here], wrong[here])
        products = _products(hidden[here], weight)
        log_sum, weights, total, spread, in_bias, answers = rows(
            products, bias, *ids, exclude_answers, logit_scale, weight.dtype
        )
        nothing = total == 0  # no column is kept: a mean of nothing is 0
        total = total.masked_fill(nothing, 1.0)
        sums = _products(weights, weight.t()) if narrow else _sums_of_rows(weights, weight)
        mean, mean_bias = sums / total.to(acc)[:, None], in_bias / total
        if not narrow:
            # H(q) + s·(h·mean + b·q) is stationary in q: what the products' roundings did to q enters squared.
            entropy = total.log() - spread / total
            refined = entropy + logit_scale * ((hidden[here].double() * mean.double()).sum(-1) + mean_bias)
            log_sum = torch.where(nothing, log_sum, refined)
        parts.append((log_sum, mean, mean_bias, answers))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in map(list, zip(*parts, strict=True)))  # type: ignore[return-value]


def _sums_of_rows(weights: Tensor, weight: Tensor) -> Tensor:
    """weights [R, V] · weight [V, d]; its error moves log_sum by itself times h, so no chain of additions is long."""
    step = COLUMNS_ON_GPU if weights.device.type == "cuda" else COLUMNS
    sums = weights.new_zeros(weights.shape[0], weight.shape[1])
    for columns, rows in zip(weights.split(step, 1), weight.split(step), strict=True):
        sums += columns @ rows  # added to `sums` inside the product, it would be one chain again
    return sums


def _products(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, K] · weightᵀ [K, M] in the accumulation dtype: 16-bit products are never rounded to 16 bits."""
    acc = accumulation_dtype(rows.dtype)
    if rows.dtype == acc:
        return torch.mm(rows, weight.t())
    if rows.device.type == "cuda":
        return torch.mm(rows, weight.t(), out_dtype=acc)
    return torch.mm(rows.to(acc), weight.t().to(acc))


def _fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, correct, wrong, exclude_answers, logit_scale, chunk_bytes
):
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    return (
        rows,
        hidden.new_empty(hidden.shape, dtype=torch.float32),
        torch.empty_like(rows),
        hidden.new_empty((hidden.shape[0] if correct is not None else 0, 2), dtype=torch.float32),
    )


_op = define(
    "linear_softmax(Tensor hidden, Tensor weight, Tensor? bias, Tensor? correct, Tensor? wrong, bool exclude_answers,"
    " float logit_scale, int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def linear_softmax(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive on the backend that serves `hidden`; arguments as in `interface.BackendModule.linear_softmax`."""
    if backends.resolve(hidden.device, hidden.dtype) == "reference":
        results = in_chunks(hidden, weight, *arguments)
    elif is_eager(hidden, weight):
        results = backend_of(hidden).linear_softmax(hidden, weight, *arguments)
    else:
        results = _op(hidden, weight, *arguments)
    return results
