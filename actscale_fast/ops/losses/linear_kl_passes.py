"""The passes of `linear_kl_div` over chunks of rows: losses and gradients at once, and the same for a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends, reference
from ..interface import LossArguments
from ..once_differentiable import once_differentiable
from ..torch_internals import graph_is_kept, is_eager
from .intervention_loss import computed_in_place
from .kl_div import weighted_divergence
from .linear_logits import slices
from .linear_softmax import wide_product

#: Rows of W whose gradient is made at once.
COLUMNS = 4096
#: Tensors of [rows, V] that a chunk takes at once: around a kernel both sides' products (in a graph, where the gradient
#: is not written over them, one more); in plain PyTorch, without and with a soft-cap, those of the accumulation dtype
#: (counted by PyTorch's profiler).
BUFFERS, BUFFERS_PLAIN, BUFFERS_PLAIN_SOFTCAP = 2, 14, 19


class Side(NamedTuple):
    """One model's last hidden states and its head."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]

    def products(self, rows: slice | Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(self.hidden[rows], self.weight, bias)


class Setting(NamedTuple):
    """The options that are not tensors."""

    inverse_temperature: float
    reverse: bool
    softcap: float | None
    chunk_bytes: int


def traced(student: Side, teacher: Side, weights: Tensor | None, setting: Setting) -> Tensor:
    dtype, every = student.weight.dtype, slice(None)
    acc = reference.accumulation_dtype(dtype)
    wide, bias = student.weight, student.bias
    if wide.requires_grad:  # a graph adds the chunks' gradients up in the dtype of what they are gradients of
        wide = wide.to(acc)
    if bias is not None and bias.requires_grad:
        bias = bias.to(acc)

    def of_rows(h: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
        h = h if weight is None else h.masked_fill((weight == 0)[:, None], 0.0)
        with torch.autocast(h.device.type, enabled=False):
            p = _Product.apply(h, wide.to(dtype), None if bias is None else bias.to(dtype))
            return weighted_divergence(p, teacher._replace(hidden=other).products(every), weight, *setting[:3])

    parts = [
        checkpoint(
            of_rows, student.hidden[rows], teacher.hidden[rows], None if weights is None else weights[rows],
            use_reentrant=False,
        )
        for rows in slices(student.hidden.shape[0], _rows_at_once(student, teacher, setting, True, in_graph=True))
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Product(torch.autograd.Function):
    """W·h + b in a graph, whose backward products autocast would take otherwise."""

    @staticmethod
    def forward(ctx: Any, h, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h, weight)
        return F.linear(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, dp):  # type: ignore[no-untyped-def]
        h, weight = ctx.saved_tensors
        with torch.autocast(dp.device.type, enabled=False):
            return (
                dp @ weight if ctx.needs_input_grad[0] else None,
                dp.t() @ h if ctx.needs_input_grad[1] else None,
                dp.sum(0) if ctx.needs_input_grad[2] else None,
            )


def _divergence_and_gradient(
    products: Tensor, others: Tensor, weights: Tensor | None, setting: Setting, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """(w·KL [R], its gradient with respect to the products), which a kernel writes over them."""
    if backends.serving("intervention_loss", products, large=True) == "reference":
        products.requires_grad_(need_grad)
        with torch.set_grad_enabled(need_grad):
            divergence = weighted_divergence(products, others, weights, *setting[:3])
            gradient = torch.autograd.grad(divergence.sum(), products)[0] if need_grad else products
        return divergence.detach(), gradient
    i, reverse, softcap, _ = setting
    call = LossArguments(
        products, others, inverse_temperature=i, reverse=reverse, need_grad=need_grad, row_weight=weights,
        softcap=softcap,
    )  # fmt: skip
    return computed_in_place(call)[1:3]  # type: ignore[return-value]


def _columns(student: Side, setting: Setting) -> int:
    """Rows of W whose gradient is made at once: in a quarter of the chunk."""
    (vocab, width), acc = student.weight.shape, reference.accumulation_dtype(student.weight.dtype)
    return min(vocab, COLUMNS, max(32, setting.chunk_bytes // (4 * width * acc.itemsize)))


def _rows_at_once(student: Side, teacher: Side, setting: Setting, head_learns: bool, *, in_graph: bool = False) -> int:
    hidden, vocab = student.hidden, student.weight.shape[0]
    acc = reference.accumulation_dtype(hidden.dtype)
    if backends.serving("intervention_loss", hidden, large=True) == "reference":
        row = vocab * acc.itemsize * (BUFFERS_PLAIN if setting.softcap is None else BUFFERS_PLAIN_SOFTCAP)
    else:
        row = vocab * hidden.element_size() * (BUFFERS + in_graph)
    row += (hidden.shape[1] + teacher.hidden.shape[1]) * (hidden.element_size() + acc.itemsize)
    taken = 0
    if head_learns:
        columns = _columns(student, setting)
        taken = columns * hidden.shape[1] * acc.itemsize  # their gradient, before it is added
        row += columns * acc.itemsize if hidden.dtype != acc else 0
    return max(1, (setting.chunk_bytes - taken) // row)


def _pass(
    student: Side, teacher: Side, weights: Tensor | None, factors: Tensor | None, setting: Setting,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """(w·KL [N], the gradients of its sum by hidden, weight and bias, None where not needed).

    That of hidden is of hidden's dtype; the head's are of the accumulation dtype, since a sum over rows may be more
    than float16 holds before the reduction's factor. `factors` [N] of the rows are left for the caller to apply to the
    losses and to the gradient of hidden, whose rows keep their own scale so; the head's gradients are sums over rows
    and take them here.
    """
    hidden, weight, _ = student
    acc = reference.accumulation_dtype(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(t, dtype=t.dtype if t is hidden else acc, memory_format=torch.contiguous_format)
        if needed and t is not None else None
        for t, needed in zip(student, needs, strict=True)
    )  # fmt: skip
    divergence = hidden.new_zeros(hidden.shape[0], dtype=acc)
    factors, largest = (None, None) if factors is None else _normalised(factors)
    counted = _counted_rows(student, weights)
    columns = _columns(student, setting)
    step = _rows_at_once(student, teacher, setting, needs[1] or needs[2])
    for part in slices(hidden.shape[0] if counted is None else len(counted), step):
        rows = part if counted is None else counted[part]
        w = None if weights is None else weights[rows]
        h = hidden[rows]
        if w is not None and counted is None:  # an ignored row may hold NaN, and 0·NaN must not reach the sum
            h = h.masked_fill((w == 0)[:, None], 0.0)
        products = student._replace(hidden=h).products(slice(None))
        divergence[rows], dp = _divergence_and_gradient(products, teacher.products(rows), w, setting, any(needs))
        del products
        if not any(needs):
            continue
        if d_hidden is not None:
            d_hidden[rows] = dp @ weight
        if factors is not None:  # on a CPU in float32, which the product copies its sides to
            f = factors[rows][:, None]
            h = (h * f).to(h.dtype if h.is_cuda else acc)
        for begin in range(0, dp.shape[1], columns):  # a sum or a product of 16-bit numbers may copy them first
            here = slice(begin, begin + columns)
            if d_weight is not None:
                d_weight[here] += wide_product(dp[:, here].t(), h)
            if d_bias is not None:
                d_bias[here] += (dp[:, here] if factors is None else dp[:, here] * f).sum(0, dtype=acc)
        del dp
    if largest is not None:
        d_weight, d_bias = (None if d is None else d.mul_(largest) for d in (d_weight, d_bias))
    return divergence, [d_hidden, d_weight, d_bias]


def _normalised(factors: Tensor) -> tuple[Tensor, Tensor]:
    """(f/max |f|, max |f|), nothing of it read by the host. None is above 1: float16 holds their products."""
    if len(factors) == 0:
        return factors, factors.new_ones(())
    largest = factors.abs().amax()
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return factors / largest, largest


def _rounded(gradients: list[Tensor | None], student: Side) -> list[Tensor | None]:
    return [None if d is None else d.to(t.dtype) for d, t in zip(gradients, student, strict=True)]  # type: ignore[union-attr]


def _counted_rows(student: Side, weights: Tensor | None) -> Tensor | None:
    """The rows that are not ignored; None where all are, or where their number is not to be read."""
    if weights is None or weights.device.type != "cpu" or not is_eager(*student, weights):
        return None
    counted = weights.nonzero()[:, 0]
    return None if len(counted) == len(weights) else counted


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, weight, bias, teacher, weights, factors, setting, reduced, needs
    ):
        student = Side(hidden, weight, bias)
        ctx.again = not reduced and (needs[1] or needs[2])
        with torch.autocast(hidden.device.type, enabled=False):
            divergence, grads = _pass(student, teacher, weights, factors, setting, (False,) * 3 if ctx.again else needs)
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        ctx.grads = grads if hidden.dtype == torch.float16 else _rounded(grads, student)
        ctx.factors = factors
        ctx.ignored = None if weights is None or not needs[0] else weights == 0
        if ctx.again:
            ctx.save_for_backward(*student, *teacher, weights)
            ctx.setting, ctx.needs = setting, needs
        if factors is not None:
            divergence = divergence * factors
        return divergence.sum() if reduced else divergence

    @staticmethod
    @once_differentiable("linear_kl_div")
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        if ctx.again:
            return *_gradients_again(ctx, upstream), *[None] * 6
        if ctx.grads is None:
            raise RuntimeError("linear_kl_div: a second backward needs retain_graph=True in the first one")
        kept, grads = graph_is_kept(upstream), ctx.grads
        if not kept:
            ctx.grads = None
        of_rows = upstream if ctx.factors is None else upstream * ctx.factors
        if ctx.ignored is not None:  # their zeros, which an upstream of inf or NaN would make NaN
            of_rows = of_rows.expand(len(ctx.ignored)).masked_fill(ctx.ignored, 1.0)
        of_rows = of_rows if of_rows.dim() == 0 else of_rows[:, None]
        scaled = [
            None if g is None else _times(g, factor, in_place=not kept).to(dtype)
            for g, factor, dtype in zip(grads, (of_rows, upstream, upstream), ctx.dtypes, strict=True)
        ]
        return *scaled, *[None] * 6


def _gradients_again(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    student, teacher = Side(*ctx.saved_tensors[:3]), Side(*ctx.saved_tensors[3:6])
    weights = ctx.saved_tensors[6]
    with torch.autocast(student.hidden.device.type, enabled=False):
        if student.hidden.dtype != torch.float16:
            weights = upstream.contiguous() if weights is None else torch.where(weights == 0, 0.0, weights * upstream)
            return _rounded(_pass(student, teacher, weights, None, ctx.setting, ctx.needs)[1], student)
        # float16 holds neither a loss scale nor upstreams of very different sizes in one tensor [rows, V].
        factors = upstream if weights is None else upstream.masked_fill(weights == 0, 0.0)
        gradients = _pass(student, teacher, weights, factors, ctx.setting, ctx.needs)[1]
        if gradients[0] is not None:
            gradients[0] = _times(gradients[0], factors[:, None], in_place=True)
    return _rounded(gradients, student)


def _times(gradient: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    if factor.dim() == 0 and gradient.device.type != "cpu":
        factor = factor.reshape(1)  # a GPU rounds one of no axes to the gradient's dtype first: 65536 is inf in float16
    return gradient.mul_(factor) if in_place else gradient * factor
