"""Correctness before speed: a variant whose error is not that of eager PyTorch is not timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Roundings, half an ulp each, on the way of a term of a sum (as in the tests of the ops).
ROUNDINGS = 8
#: A variant may be this many times as far from float64 as the baseline, beside one rounding of its dtype and
#: the roundings of the terms it sums.
ALLOWED_RATIO = 2.0


@dataclass(frozen=True)
class Verdict:
    """The largest error of any result, relative to that result's largest value; `reason` is "" where it is accepted."""

    error: float
    allowed: float
    reason: str = ""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """max|got − exact| / max|exact|; infinite where one of them is not a number and the other is."""
    difference = (got.detach().to(exact.device, torch.float64) - exact.detach()).abs()
    if not difference.numel():
        return 0.0
    largest = float(difference.max())
    return largest / largest_value(exact) if math.isfinite(largest) else math.inf


def largest_value(exact: Tensor) -> float:
    return max(float(exact.detach().abs().max()), 1e-300)


def verdict(
    got: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    baselines: Sequence[tuple[Tensor, ...]],
    terms: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Verdict:
    """Whether each result is as exact as the least exact baseline, by the rule above; the last two are `Problem`'s."""
    terms = terms or (0.0,) * len(exact)
    if len(got) != len(exact):
        return Verdict(math.inf, 0.0, f"{len(got)} results, expected {len(exact)}")
    worst = Verdict(0.0, math.inf)
    for index, (value, truth, size) in enumerate(zip(got, exact, terms, strict=True)):
        if value.shape != truth.shape:
            return Verdict(
                math.inf, 0.0, f"result {index} has shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
            )
        error = relative_error(value, truth)
        plain = max(relative_error(results[index], truth) for results in baselines)
        allowed = ALLOWED_RATIO * plain + torch.finfo(value.dtype).eps
        if size and truth.numel():
            allowed += ROUNDINGS / 2 * torch.finfo(dtype).eps * size / largest_value(truth)
        if not error <= allowed:
            return Verdict(error, allowed, f"result {index} is off by {error:.2g}, allowed {allowed:.2g}")
        if error / allowed >= worst.error / worst.allowed:
            worst = Verdict(error, allowed)
    return worst
