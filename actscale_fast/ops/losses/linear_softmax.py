"""The softmax over a vocabulary and its mean of the rows of W, from hidden states: attention with K = V = W.

    z = s·(W·h + b),  q = softmax(z) over the kept columns:  log Σ exp(z),  Wᵀq,  q·b  and z at the two answers

The C++ backend does it in one read of W for every 64 rows (csrc/cpu/linear_softmax_splits.h), with the same bits for a
row in every batch. Everywhere else it goes over chunks of rows: a matrix product into float32 logits, one kernel that
turns them into weights e^{z − max}, and a second matrix product. Weights are at most 1 and divided by their sum at the
end, so that float16 holds them. There a row's bits are the same for the same rows in one call and the same chunk_bytes,
and float32 products follow the user's setting of TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, outputs
from ..reference import accumulation_dtype
from ..registry import define
from .linear_logits import slices

#: Extra memory of one call, at most (at least one row of logits).
CHUNK_BYTES = 256 << 20
#: Columns whose products are added up in one chain of float32 additions, on a CPU and on a GPU (there not measured).
#: V = 50257, d = 5, fp32, PyTorch on a CPU: h·mean is off by 1.5e-4 in one chain, by 1.4e-5 in chains of 4096, by 3e-6
#: in chains of 1024; at 32 rows of d = 576 it makes no difference.
COLUMNS, COLUMNS_ON_GPU = 1024, 16384
#: Tensors of [rows, COLUMNS] at once between the products: the weights, their products, and a sum's float64 copy.
SLICE_BUFFERS = 5

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
    offset = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = z if dtype == z.dtype else torch.empty_like(z, dtype=dtype)
    total, spread, in_bias = (torch.zeros(z.shape[0], dtype=torch.float64, device=z.device) for _ in range(3))
    for part in slices(z.shape[1], _columns(z.device)):  # a sum in float64 copies what it sums
        powers = z[:, part].sub_(offset).mul_(logit_scale)
        e = powers.exp()
        total += e.sum(1, dtype=torch.float64)
        gone = e == 0
        spread += powers.masked_fill_(gone, 0.0).mul_(e).sum(1, dtype=torch.float64)
        if bias is not None:
            in_bias += torch.mul(e, bias[part], out=powers).masked_fill_(gone, 0.0).sum(1, dtype=torch.float64)
        weights[:, part] = e  # where the products were
    log_sum = logit_scale * largest[:, 0].double() + total.log()
    return log_sum, weights, total, spread, in_bias, answers


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
    step = _step(weight, chunk_bytes)
    mean, parts = hidden.new_empty(hidden.shape, dtype=acc), []
    for here in slices(hidden.shape[0], _rows_within(chunk_bytes, weight, step)):
        ids = (None, None) if correct is None or wrong is None else (correct[here], wrong[here])
        products = _logits(hidden[here], weight, step)
        log_sum, weights, total, spread, in_bias, answers = rows(
            products, bias, *ids, exclude_answers, logit_scale, weight.dtype
        )
        del products
        nothing = total == 0  # no column is kept: a mean of nothing is 0
        total = total.masked_fill(nothing, 1.0)
        mean[here] = sums_of_rows(weights, weight, step).div_(total.to(acc)[:, None])
        mean_bias = in_bias / total
        del weights
        if weight.dtype == acc:
            # H(q) + s·(h·mean + b·q) is stationary in q: what the products' roundings did to q enters squared.
            refined = total.log() - spread / total
            refined += logit_scale * (inner_products(hidden[here], mean[here], chunk_bytes) + mean_bias)
            log_sum = torch.where(nothing, log_sum, refined)
        parts.append((log_sum, mean_bias, answers))
    log_sum, mean_bias, answers = (
        parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    )
    return log_sum, mean, mean_bias, answers


def _columns(device: torch.device) -> int:
    return COLUMNS_ON_GPU if device.type == "cuda" else COLUMNS


def _step(weight: Tensor, chunk_bytes: int) -> int:
    """Rows of W that are multiplied at once."""
    if _multiplied_as_it_is(weight):
        return _columns(weight.device)
    return max(32, min(COLUMNS, chunk_bytes // (16 * weight.shape[1])))  # their float32 copy: a quarter of it


def _rows_within(chunk_bytes: int, weight: Tensor, step: int) -> int:
    """How many rows' logits and weights, with what they need on the way, fit into `chunk_bytes`."""
    (vocab, width), acc = weight.shape, accumulation_dtype(weight.dtype)
    row = acc.itemsize * (vocab + SLICE_BUFFERS * min(vocab, _columns(weight.device)) + 2 * width)
    if weight.dtype != acc:
        row += vocab * weight.dtype.itemsize
    copied = 0 if _multiplied_as_it_is(weight) else min(vocab, step) * width * acc.itemsize
    return max(1, (chunk_bytes - copied) // row)


def inner_products(a: Tensor, b: Tensor, chunk_bytes: int) -> Tensor:
    """Σ a·b of each row in float64, [N]; their float64 copies and products fit into `chunk_bytes`."""
    step = max(1, chunk_bytes // (3 * 8 * a.shape[1]))
    parts = [(a[rows].double() * b[rows].double()).sum(-1) for rows in slices(a.shape[0], step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _logits(hidden: Tensor, weight: Tensor, step: int) -> Tensor:
    """hidden [R, d] · weightᵀ [d, V] in the accumulation dtype."""
    if _multiplied_as_it_is(hidden):
        return wide_product(hidden, weight.t())
    acc = accumulation_dtype(hidden.dtype)
    hidden, products = hidden.to(acc), hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=acc)
    for columns in slices(weight.shape[0], step):
        products[:, columns] = hidden @ weight[columns].t().to(acc)
    return products


def sums_of_rows(weights: Tensor, weight: Tensor, step: int) -> Tensor:
    """weights [R, V] · weight [V, d]; its error moves log_sum by itself times h, so no chain of additions is long."""
    acc = accumulation_dtype(weights.dtype)
    if weight.dtype != acc and _multiplied_as_it_is(weight):
        return wide_product(weights, weight)  # 16-bit weights are off by more than a long chain is
    sums = weights.new_zeros((weights.shape[0], weight.shape[1]), dtype=acc)
    for columns in slices(weight.shape[0], step):
        sums += wide_product(weights[:, columns], weight[columns])  # inside the product it would be one chain again
    return sums


def _multiplied_as_it_is(x: Tensor) -> bool:
    """Whether products of `x` need no copy of it in the accumulation dtype."""
    return x.device.type == "cuda" or x.dtype == accumulation_dtype(x.dtype)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] · right [K, N] in the accumulation dtype: 16-bit products are never rounded to 16 bits."""
    acc = accumulation_dtype(left.dtype)
    if left.dtype == acc:
        return torch.mm(left, right)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=acc)
    return torch.mm(left.to(acc), right.to(acc))


_op = define(
    "linear_softmax(Tensor hidden, Tensor weight, Tensor? bias, Tensor? correct, Tensor? wrong, bool exclude_answers,"
    " float logit_scale, int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, correct, *rest: outputs.linear_softmax(hidden, correct),
)


def linear_softmax(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The primitive on the backend that serves `hidden`; arguments as in `interface.BackendModule.linear_softmax`."""
    if backends.serving("linear_softmax", hidden) == "reference":
        return in_chunks(hidden, weight, *arguments)
    return _op(hidden, weight, *arguments)  # type: ignore[no-any-return]
