"""Scaling each head's vector by a probe of that vector: α = ⟨w, h⟩ + c, y = h·(1 + β·α).

One op per direction. With a = β·⟨h, dy⟩ + dα (the upstream of α, where it has one) the backward pass is
dh = dy·(1 + β·α) + a·w,  dw = Σ a·h,  dc = Σ a, the sums carried along while dh is written.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, checks, outputs, reference
from .once_differentiable import once_differentiable
from .registry import LIBRARY, define, pinned
from .torch_internals import below_autograd

_forward_op = define(
    "dynamic_scale(Tensor x, Tensor weight, Tensor? bias, float strength, Tensor? row_strength, Tensor? group)"
    " -> (Tensor, Tensor)",
    lambda x, *rest: outputs.dynamic_scale(x),
)
_backward_op = define(
    "dynamic_scale_backward(Tensor dy, Tensor? d_scalars, Tensor x, Tensor weight, Tensor scalars, float strength,"
    " Tensor? row_strength, Tensor? group, bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dy, d_scalars, x, weight, scalars, strength, row_strength, group, *needs: outputs.dynamic_scale_gradients(
        x, weight, *needs
    ),
)


@overload
def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    group: Tensor | None = None,
    return_scalars: Literal[False] = False,
) -> Tensor: ...
@overload
def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    group: Tensor | None = None,
    return_scalars: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dynamic_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    group: Tensor | None = None,
    return_scalars: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multiply each head's vector by 1 + β·α, where α = ⟨weight, x⟩ + bias (arXiv 2410.04962, eq. 10).

    Args:
        x: activations [B, T, H, D]; float32, bfloat16 or float16 (float64 through the reference backend).
        weight: probes [H, D], or one for each row group [G, H, D].
        bias: [H], with groups [G, H]; None: 0. Eq. 10 has none.
        strength: β, a float or one value per row [B]; 0 is the identity. Not differentiated.
        group: int64 [B], the row group of each row of x. None: G is 1, or G is B and row b uses its own probe.
        return_scalars: return α too, so that a penalty on it is learned through the same backward pass.

    Returns:
        y [B, T, H, D] in x's dtype, computed in float32 and rounded once; with return_scalars (y, α), α [B, T, H] in
        float32 (float64 for a float64 x). Gradients reach x, weight and bias, from y and from α.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; on CPU also a group out of range
            (on a GPU, where nothing is synchronised, such a row becomes NaN).

    Once differentiable; torch.func transforms are not supported.

    Example:
        >>> weight = torch.zeros(9, 64, requires_grad=True)
        >>> y, alpha = dynamic_scale(torch.randn(2, 5, 9, 64), weight, strength=-1.0, return_scalars=True)
    """
    checks.floating_tensor("x", x, "[B, T, H, D]")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, T, H, D]")
    n_rows, _, n_heads, head_dim = x.shape
    weight = _by_group("weight", weight, x, (n_heads, head_dim))
    n_groups = weight.shape[0]
    if bias is not None:
        bias = _by_group("bias", bias, x, (n_heads,))
        if bias.shape[0] != n_groups:
            raise ValueError(f"bias: got {bias.shape[0]} groups, expected {n_groups} as weight has")
    group = checks.row_groups(group, n_groups, n_rows, x.device)
    strength, row_strength = checks.strengths(strength, n_rows, x.device, learn="weight")
    if backends.serving("dynamic_scale", x) == "reference":
        if group is not None:
            checks.ids_in_range("group", group, n_groups, "group")
        y, scalars = reference.dynamic_scale(x, weight, bias, strength, row_strength, group)
    else:
        y, scalars = _run(x, weight, bias, strength, row_strength, group)
    return (y, scalars) if return_scalars else y


def _by_group(name: str, values: object, x: Tensor, trailing: tuple[int, ...]) -> Tensor:
    """`values` [*trailing] or [G, *trailing] as [G, *trailing]."""
    shape = ", ".join("HD"[: len(trailing)])
    tensor = checks.floating_tensor(name, values, f"[{shape}] or [G, {shape}]")
    checks.same_device(name, tensor, x.device)
    if tensor.dim() == len(trailing):
        tensor = tensor[None]
    if tensor.dim() != 1 + len(trailing) or tensor.shape[1:] != trailing:
        sizes = ", ".join(map(str, trailing))
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected [{sizes}] or [G, {sizes}]")  # type: ignore[attr-defined]
    return tensor


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strength: float,
    row_strength: Tensor | None,
    group: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weight = weight.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    if row_strength is not None:
        row_strength = row_strength.to(torch.float32)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return _forward_op(x, weight, bias, strength, row_strength, group)  # type: ignore[no-any-return]


class _DynamicScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, strength, row_strength, group):  # type: ignore[no-untyped-def]
        with below_autograd():
            y, scalars = _forward_op(x, weight, bias, strength, row_strength, group)
        ctx.save_for_backward(x, weight, scalars, row_strength, group)
        ctx.strength, ctx.backend = strength, backends.serving("dynamic_scale", x)
        ctx.set_materialize_grads(False)
        return y, scalars

    @staticmethod
    @once_differentiable("dynamic_scale")
    def backward(ctx: Any, dy, d_scalars):  # type: ignore[no-untyped-def]
        if dy is None and d_scalars is None:
            return (None,) * 6
        x, weight, scalars, row_strength, group = ctx.saved_tensors
        if dy is None:  # only α was used: a zero upstream of one head's memory
            dy = x.new_zeros(x.shape[-1]).expand(x.shape)
        needs = ctx.needs_input_grad[:3]
        with pinned(ctx.backend):
            gradients = _backward_op(dy, d_scalars, x, weight, scalars, ctx.strength, row_strength, group, *needs)
        dx, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return dx, dweight, dbias, None, None, None


LIBRARY.impl("dynamic_scale", _DynamicScale.apply, "Autograd")
