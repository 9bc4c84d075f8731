"""Cases of the ops that scale activations: per head, per head by a probe, per channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..case import Case, Inputs


def scale_heads(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Shapes, strides, groups and strengths of y = x·(1 + β·α) + β·v."""

    def case(name: str, x: Tensor, groups: int = 1, positions: int = 1, **options: Any) -> Case:
        heads, width = x.shape[2:]
        alpha = inputs.normal(groups, positions, heads) if options.pop("scaled", True) else None
        shift = inputs.normal(groups, positions, heads, width) if options.pop("shifted", False) else None
        group = inputs.integers(groups, x.shape[0]) if groups > 1 else None
        upstream = options.pop("upstream", None)
        upstream = inputs.activations(*x.shape) if upstream is None else upstream
        strength = options.pop("strength", -0.7)
        arguments = (x, alpha, shift, strength, group, upstream)
        return Case(name, _scale_heads, arguments, _magnitudes(_scale_heads), **options)

    new = inputs.activations
    yield case("one value", new(1, 1, 1, 1))
    yield case("one token", new(1, 1, 9, 64))
    yield case("odd", new(3, 5, 7, 33), shifted=True)
    yield case("unaligned", new(2, 3, 5, 64), shifted=True, offset=1)
    yield case("one scalar per position", new(2, 7, 4, 48), positions=7, shifted=True)
    yield case("shift alone", new(2, 3, 4, 40), scaled=False, shifted=True)
    yield case("row groups", new(6, 3, 4, 16), groups=3, shifted=True)
    yield case("a strength per row", new(4, 5, 3, 32), strength=torch.tensor([0.0, 1.0, -1.0, 0.5]))
    yield case("identity", new(2, 3, 4, 64), strength=0.0)
    yield case("a slice of heads", new(2, 5, 8, 24)[:, :, 2:5])
    yield case("heads before positions", new(2, 4, 6, 64).transpose(1, 2))
    yield case("expanded upstream", new(2, 5, 3, 64), upstream=new(1).expand(2, 5, 3, 64))
    yield case("no rows", new(0, 4, 2, 8))
    yield case("wide heads", new(2, 3, 2, 1100), shifted=True)
    yield case("more blocks than multiprocessors", new(2, 4 * multiprocessors + 3, 2, 64))
    extreme = new(1, 2, 2, 8)
    extreme[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=extreme.dtype)
    yield Case("infinities", _scale_heads_forward, (extreme, torch.ones(1, 1, 2)))
    values = (new(3, 1, 2, 8), inputs.normal(2, 1, 2), None, 1.0)
    upstream = new(3, 1, 2, 8)
    good, bad = ((*values, torch.tensor([0, group, 1]), upstream) for group in (1, 2))
    yield Case("a group out of range", _scale_heads, bad, refused_row=1, valid=good)


def _scale_heads(
    x: Tensor, alpha: Tensor | None, shift: Tensor | None, strength: Any, group: Tensor | None, upstream: Tensor
) -> tuple[Tensor, ...]:
    x, alpha, shift = (_leaf(value) for value in (x, alpha, shift))
    y = ops.scale_heads(x, alpha, shift=shift, strength=strength, group=group)
    return y.detach(), *_gradients(y, (x, alpha, shift), upstream)


def _scale_heads_forward(x: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    return (ops.scale_heads(x, alpha, strength=0.5),)


def dynamic_scale(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Shapes, strides, groups and strengths of y = x·(1 + β·α), α = ⟨w, x⟩ + c."""

    def case(name: str, x: Tensor, groups: int = 0, **options: Any) -> Case:
        heads, width = x.shape[2:]
        leading = (groups,) if groups else ()
        weight = inputs.normal(*leading, heads, width, scale=width**-0.5)
        bias = inputs.normal(*leading, heads) if options.pop("biased", True) else None
        group = inputs.integers(groups, x.shape[0]) if groups else None
        strength = options.pop("strength", -0.7)
        arguments = (x, weight, bias, strength, group, inputs.activations(*x.shape), inputs.normal(*x.shape[:3]))
        return Case(name, _dynamic_scale, arguments, _magnitudes(_dynamic_scale), **options)

    new = inputs.activations
    yield case("one value", new(1, 1, 1, 1))
    yield case("one token", new(1, 1, 9, 64), biased=False)
    yield case("odd", new(3, 5, 7, 33))
    yield case("unaligned", new(2, 3, 5, 64), offset=1)
    yield case("row groups", new(6, 3, 4, 16), groups=3)
    yield case("a strength per row", new(4, 5, 3, 32), strength=torch.tensor([0.0, 1.0, -1.0, 0.5]))
    yield case("a slice of heads", new(2, 5, 8, 24)[:, :, 2:5])
    yield case("no rows", new(0, 4, 2, 8))
    yield case("wide heads", new(2, 3, 2, 1100))
    yield case("more blocks than multiprocessors", new(2, 4 * multiprocessors + 3, 2, 64))
    values = (new(3, 1, 2, 8), inputs.normal(2, 2, 8), None, 1.0)
    upstreams = (new(3, 1, 2, 8), torch.zeros(3, 1, 2))
    good, bad = ((*values, torch.tensor([0, group, 1]), *upstreams) for group in (1, 2))
    yield Case("a group out of range", _dynamic_scale, bad, refused_row=1, valid=good)


def _dynamic_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, strength: Any, group: Tensor | None, upstream: Tensor,
    of_scalars: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    x, weight, bias = (_leaf(value) for value in (x, weight, bias))
    y, scalars = ops.dynamic_scale(x, weight, bias, strength=strength, group=group, return_scalars=True)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    gradients = torch.autograd.grad((y, scalars), leaves, (upstream, of_scalars.to(scalars.dtype)))
    return y.detach(), scalars.detach(), *gradients


def scale_channels(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Shapes and strides of y = x·w over the last axis."""

    def case(name: str, x: Tensor, upstream: Tensor | None = None, **options: Any) -> Case:
        upstream = inputs.activations(*x.shape) if upstream is None else upstream
        arguments = (x, inputs.normal(x.shape[-1]), upstream)
        return Case(name, _scale_channels, arguments, _magnitudes(_scale_channels), **options)

    new = inputs.activations
    yield case("one value", new(1))
    yield case("odd", new(3, 5, 33))
    yield case("unaligned", new(7, 64), offset=1)
    yield case("a slice of columns", new(6, 96)[:, 10:70])
    yield case("expanded upstream", new(5, 64), upstream=new(1).expand(5, 64))
    yield case("no rows", new(0, 8))
    yield case("wide", new(3, 4099))
    yield case("more rows than multiprocessors", new(4 * multiprocessors + 3, 48))


def _scale_channels(x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    x, weight = _leaf(x), _leaf(weight)
    y = ops.scale_channels(x, weight)
    return y.detach(), *_gradients(y, (x, weight), upstream)


def _leaf(value: Any) -> Any:
    return None if value is None else value.detach().requires_grad_()


def _gradients(y: Tensor, leaves: tuple[Any, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream)


def _magnitudes(call: Any) -> Any:
    """The size of the terms of sums of products: the largest results of the same call on magnitudes."""

    def terms(*arguments: Any) -> tuple[float, ...]:
        def magnitude(value: Any) -> Any:
            is_number = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
            return abs(value) if is_number else value

        results = call(*(magnitude(value) for value in arguments))
        return tuple(float(result.abs().max()) if result.numel() else 0.0 for result in results)

    return terms
