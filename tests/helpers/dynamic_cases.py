"""What the tests of dynamic_scale share: arguments, the op, and the formula in float64, written apart from the ops."""

from __future__ import annotations

import functools
from typing import NamedTuple

import op_cases
import torch
from op_cases import Inputs, assert_as_exact_as_eager
from torch import Tensor

from actscale_fast import ops

BACKENDS = op_cases.BACKENDS
over = functools.partial(op_cases.over, backends=BACKENDS)


class Shape(NamedTuple):
    rows: int  # B
    tokens: int  # T
    heads: int  # H
    dim: int  # D
    groups: int = 1  # G


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    strength: float | Tensor
    group: Tensor | None
    dy: Tensor
    d_scalars: Tensor | None

    def to(self, device: torch.device) -> Arguments:
        return Arguments(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


def arguments(inputs: Inputs, shape: Shape, dtype: torch.dtype = torch.float32) -> Arguments:
    rows, tokens, heads, dim, groups = shape
    return Arguments(
        inputs.normal(rows, tokens, heads, dim, dtype=dtype),
        inputs.normal(groups, heads, dim, scale=dim**-0.5),
        inputs.normal(groups, heads),
        inputs.normal(rows),
        inputs.integers(groups, rows) if groups not in (1, rows) else None,
        inputs.normal(rows, tokens, heads, dim, dtype=dtype),
        inputs.normal(rows, tokens, heads),
    )


def fused(given: Arguments) -> tuple[Tensor, ...]:
    """(y, α, dx, dweight, dbias where there is one) of dynamic_scale."""
    x, weight, bias = (None if t is None else t.detach().requires_grad_() for t in given[:3])
    assert x is not None
    assert weight is not None
    y, scalars = ops.dynamic_scale(x, weight, bias, strength=given.strength, group=given.group, return_scalars=True)
    results, upstream = ((y,), (given.dy,)) if given.d_scalars is None else ((y, scalars), (given.dy, given.d_scalars))
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    return y.detach(), scalars.detach(), *torch.autograd.grad(results, leaves, upstream)


def textbook(given: Arguments, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same by the definition y = x + β·α·x, one row of the batch at a time, in `dtype` on the CPU."""
    x, weight, bias, strength, group, dy, d_scalars = (t.detach().cpu() if isinstance(t, Tensor) else t for t in given)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
    beta = torch.as_tensor(strength, dtype=dtype).expand(len(x))
    ys, alphas = [], []
    for b, row in enumerate(leaves[0]):
        g = int(group[b]) if group is not None else (0 if len(weight) == 1 else b)
        alpha = torch.einsum("thd,hd->th", row, leaves[1][g])
        if bias is not None:
            alpha = alpha + leaves[2][g]
        alphas.append(alpha)
        ys.append(row + beta[b] * torch.einsum("th,thd->thd", alpha, row))
    y, scalars = torch.stack(ys), torch.stack(alphas)
    total = (y * dy.to(dtype)).sum()
    if d_scalars is not None:
        total = total + (scalars * d_scalars.to(dtype)).sum()
    return y.detach(), scalars.detach(), *torch.autograd.grad(total, leaves)


def check(given: Arguments) -> None:
    """Values and every gradient against float64, within twice the error of eager float32."""
    got, exact, eager = fused(given), textbook(given, torch.float64), textbook(given, torch.float32)
    magnitudes = Arguments(
        *(abs(v) if v is not None and name != "group" else v for name, v in given._asdict().items())  # type: ignore[arg-type]
    )  # the terms of every sum: the same formula of what is positive alone
    conditions = textbook(magnitudes, torch.float64)
    names = ("y", "alpha", "dx", "dweight", "dbias")
    for name, *values in zip(names, got, exact, eager, conditions, strict=False):
        assert values[0].dtype == (given.x.dtype if name in ("y", "dx") else torch.float32)
        assert_as_exact_as_eager(name, *values[:3], condition=values[3])
    assert len(got) == len(exact)
