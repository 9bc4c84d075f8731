"""When a result counts as right: its error is that of eager PyTorch, or what rounding explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Roundings, half an ulp each, on the way of a term of a sum (as in the tests of the ops).
ROUNDINGS = 8
#: A result may be this many times as far from float64 as eager PyTorch's, beside one rounding of its dtype and the
#: roundings of the terms that it sums.
ALLOWED_RATIO = 2.0


@dataclass(frozen=True)
class Accuracy:
    """The largest error of any result, relative to that result's largest value; `reason` is "" where it is accepted."""

    error: float
    allowed: float
    reason: str = ""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """max|got − exact| / max|exact|; infinite where one of them is not finite and the other one is not the same."""
    got, exact = got.detach().to(exact.device, torch.float64), exact.detach()
    finite = exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)):
        return math.inf
    difference = (got - exact)[finite].abs()
    if not difference.numel():
        return 0.0
    largest = float(difference.max())
    return largest / largest_value(exact) if math.isfinite(largest) else math.inf


def largest_value(exact: Tensor) -> float:
    """max|exact| over its finite values, never 0."""
    values = exact.detach()[exact.isfinite()]
    return max(float(values.abs().max()) if values.numel() else 0.0, 1e-300)


def accuracy(
    got: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    baselines: Sequence[tuple[Tensor, ...]],
    terms: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Whether each result is as exact as the least exact baseline, by the rule above.

    Args:
        got, exact: the results, and those in float64.
        baselines: the results of plain PyTorch.
        terms: for each result the size of the terms whose sum or difference it is (Σ of magnitudes, float64), 0 where
            it is none: adding them in another order moves the result by a rounding at that size.
        dtype: what those terms are computed in.
    """
    terms = terms or (0.0,) * len(exact)
    if len(got) != len(exact):
        return Accuracy(math.inf, 0.0, f"{len(got)} results, expected {len(exact)}")
    worst = Accuracy(0.0, math.inf)
    for index, (value, truth, size) in enumerate(zip(got, exact, terms, strict=True)):
        if value.shape != truth.shape:
            return Accuracy(
                math.inf, 0.0, f"result {index} has shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
            )
        error = relative_error(value, truth)
        plain = max(relative_error(results[index], truth) for results in baselines)
        allowed = ALLOWED_RATIO * plain + torch.finfo(value.dtype).eps
        if size and truth.numel():
            allowed += ROUNDINGS / 2 * torch.finfo(dtype).eps * size / largest_value(truth)
        if not error <= allowed:
            return Accuracy(error, allowed, f"result {index} is off by {error:.2g}, allowed {allowed:.2g}")
        if error / allowed >= worst.error / worst.allowed:
            worst = Accuracy(error, allowed)
    return worst
