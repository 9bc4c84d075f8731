"""The KL divergence of two models' next tokens from their hidden states: no [N, V] tensor is ever whole.

For some rows at a time: both heads' products P = W·h + b, the fused kernel of `kl_div`, which writes dP over P, and
    dh = dP·W,   dW = Σ_chunks dPᵀ·h,   db = Σ_chunks Σ_rows dP
so a step is the two products of the logits and one for each gradient, all in the forward pass; the backward pass
multiplies by the upstream gradient. Only where losses of single rows go on and a head learns, dW is not yet known: the
backward pass then makes the chunk's logits again. The head's scale g is no pass of its own: with z = g·P,
    u(z)/T = g/T·(s/g)·tanh(P/(s/g)),
the kernel's own form at the inverse temperature g/T and the soft-cap s/g. dW and db are added in float32 (float64 for
float64) and rounded once. Saved: the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import backends, checks, reference
from .kl_div import Reduction, check_options, reduced_weights, row_weights
from .linear_logits import slices
from .linear_softmax import CHUNK_BYTES, wide_product
from .loss import KLDirection, computed, fused_losses, graph_is_kept
from .registry import is_eager

#: Rows of W whose gradient is made at once.
COLUMNS = 4096
#: Tensors of [rows, V] that a chunk takes at once: around a kernel both sides' products; in plain PyTorch, without and
#: with a soft-cap, those of the accumulation dtype (counted by PyTorch's profiler).
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
    """What is no tensor."""

    inverse_temperature: float
    reverse: bool
    softcap: float | None
    chunk_bytes: int


def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "none",
    kl: KLDirection = "forward",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`kl_div_from_logits` of the logits softcap·tanh(logit_scale·(W·h + b)/softcap) of two models, without the logits.

    Args:
        hidden: [..., d], the student's last hidden states, as its head takes them.
        weight: [V, d], its head, of hidden's dtype. It and the bias get gradients where they require them: pass
            weight.detach() where the head is frozen, which saves a product of four.
        reference_hidden: [..., d₂], the teacher's hidden states, of hidden's dtype; constant. d₂ may differ from d.
        reference_weight: [V, d₂], the teacher's head, taken as a constant. None: `weight` and `bias`, the same head.
        bias, reference_bias: [V] or None.
        softcap, logit_scale: of both heads, as in `reference_statistics`; the cap is taken in float32.
        temperature, reduction, kl, labels, ignore_index, row_weight: as in `kl_div_from_logits`. On CPU tensors outside
            of a trace ignored rows are left out of the matrix products. On a GPU their number is not read, since that
            would wait for it: where they are many, pass hidden[kept] and reference_hidden[kept].
        chunk_bytes: extra memory beside the gradients, at most (at least one row of both models' logits).

    Returns:
        float32 (float64 for float64 inputs), of shape [...] or [].

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, temperature, soft-cap or reduction.

    Logits are rounded to hidden's dtype as a model's are, whatever autocast says; float32 products follow
    `torch.set_float32_matmul_precision`. With reduction "none" and a head that learns the logits are made twice. What
    `kl_div_from_logits` says of T², the soft-cap, hard labels and float16 holds here too.

    Once differentiable; torch.func transforms are not supported.
    """
    inverse_temperature, reverse = check_options(temperature, reduction, kl, softcap)
    if not checks.number("logit_scale", logit_scale) > 0:
        raise ValueError(f"logit_scale: got {logit_scale}, expected a positive number")
    if not isinstance(chunk_bytes, int) or chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: got {chunk_bytes!r}, expected a positive int")
    student = _side("", hidden, weight, bias)
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias: got one without reference_weight, whose head's it is; expected None")
        reference_weight, reference_bias = weight, bias
    teacher = _side("reference_", reference_hidden, reference_weight, reference_bias)
    _check_sides(student, teacher)
    teacher = Side(*(None if t is None else t.detach() for t in teacher))  # type: ignore[arg-type]
    leading = hidden.shape[:-1]
    rows = Side(hidden.reshape(leading.numel(), hidden.shape[-1]), weight, bias)
    others = teacher._replace(hidden=teacher.hidden.reshape(leading.numel(), teacher.hidden.shape[-1]))
    weights = row_weights(labels, ignore_index, row_weight, leading, rows.hidden)
    weights, divisor = reduced_weights(weights, reduction, rows.hidden)
    scale = float(logit_scale)
    setting = Setting(inverse_temperature * scale, reverse, None if softcap is None else softcap / scale, chunk_bytes)
    reduced = reduction != "none"
    if torch.compiler.is_compiling():  # a graph plans what it keeps and what it makes again
        losses = _traced(rows, others, weights, setting)
        losses = losses.sum() if reduced else losses
    else:
        needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in rows)
        losses = _LinearKL.apply(*rows, others, weights, setting, reduced, needs)
    if not reduced:
        return losses.reshape(leading)
    return losses if divisor is None else losses / divisor


def _side(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Side:
    checks.floating_tensor(f"{prefix}hidden", hidden, "[..., d]")
    checks.floating_tensor(f"{prefix}weight", weight, "[V, d]")
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: got shape {tuple(hidden.shape)}, expected [..., d]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{prefix}weight: got dtype {weight.dtype}, expected {hidden.dtype} as {prefix}hidden has")
    checks.same_device(f"{prefix}weight", weight, hidden.device)
    if bias is not None:
        checks.same_device(f"{prefix}bias", checks.floating_tensor(f"{prefix}bias", bias, "[V]"), hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    return Side(hidden, weight, bias)


def _check_sides(student: Side, teacher: Side) -> None:
    hidden, other = student.hidden, teacher.hidden
    if other.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"reference_hidden: got shape {tuple(other.shape)}, expected {[*hidden.shape[:-1], 'd']} as hidden has"
        )
    if other.dtype != hidden.dtype:
        raise TypeError(f"reference_hidden: got dtype {other.dtype}, expected {hidden.dtype} as hidden has")
    checks.same_device("reference_hidden", other, hidden.device)
    if teacher.weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            f"reference_weight: got {teacher.weight.shape[0]} tokens, expected {student.weight.shape[0]} as weight has"
        )
    if other.requires_grad and torch.is_grad_enabled():
        raise ValueError("reference_hidden: requires a gradient, but the reference is a constant; detach it")


def _traced(student: Side, teacher: Side, weights: Tensor | None, setting: Setting) -> Tensor:
    def of_rows(h: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
        every = slice(None)
        h = h if weight is None else h.masked_fill((weight == 0)[:, None], 0.0)
        p, r = student._replace(hidden=h).products(every), teacher._replace(hidden=other).products(every)
        return _divergence(p, r, weight, setting)

    parts = [
        checkpoint(
            of_rows, student.hidden[rows], teacher.hidden[rows], None if weights is None else weights[rows],
            use_reentrant=False,
        )
        for rows in slices(student.hidden.shape[0], _rows_at_once(student, teacher, setting, True))
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _divergence(products: Tensor, others: Tensor, weights: Tensor | None, setting: Setting) -> Tensor:
    """w·KL [R], differentiable by the products."""
    i, reverse, softcap, _ = setting
    if backends.resolve(products.device, products.dtype) != "reference":
        return fused_losses(
            products, others, None, None, None, None, 0.0, i, False, reverse, row_weight=weights, softcap=softcap
        )[1]
    return reference.intervention_loss(
        products, others, None, None, None, inverse_temperature=i, reverse=reverse, row_weight=weights, softcap=softcap
    )[1]


def _divergence_and_gradient(
    products: Tensor, others: Tensor, weights: Tensor | None, setting: Setting, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """(w·KL [R], its gradient by the products), which a kernel writes over them."""
    if backends.resolve(products.device, products.dtype) == "reference":
        products.requires_grad_(need_grad)
        with torch.set_grad_enabled(need_grad):
            divergence = _divergence(products, others, weights, setting)
            gradient = torch.autograd.grad(divergence.sum(), products)[0] if need_grad else products
        return divergence.detach(), gradient
    i, reverse, softcap, _ = setting
    arguments = (products, others, None, None, None, None, 0.0, i, False, reverse, need_grad, weights, softcap)
    return computed(*arguments, in_place=need_grad)[1:3]  # type: ignore[return-value]


def _columns(student: Side, setting: Setting) -> int:
    """Rows of W whose gradient is made at once: in a quarter of the chunk."""
    (vocab, width), acc = student.weight.shape, reference.accumulation_dtype(student.weight.dtype)
    return min(vocab, COLUMNS, max(32, setting.chunk_bytes // (4 * width * acc.itemsize)))


def _rows_at_once(student: Side, teacher: Side, setting: Setting, head_learns: bool) -> int:
    hidden, vocab = student.hidden, student.weight.shape[0]
    acc = reference.accumulation_dtype(hidden.dtype)
    if backends.resolve(hidden.device, hidden.dtype) == "reference":
        row = vocab * acc.itemsize * (BUFFERS_PLAIN if setting.softcap is None else BUFFERS_PLAIN_SOFTCAP)
    else:
        row = vocab * hidden.element_size() * BUFFERS
    row += (hidden.shape[1] + teacher.hidden.shape[1]) * (hidden.element_size() + acc.itemsize)
    taken = 0
    if head_learns:
        columns = _columns(student, setting)
        taken = columns * hidden.shape[1] * acc.itemsize  # their gradient, before it is added
        row += columns * acc.itemsize if hidden.dtype != acc else 0
    return max(1, (setting.chunk_bytes - taken) // row)


def _pass(
    student: Side, teacher: Side, weights: Tensor | None, setting: Setting, needs: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """(w·KL [N], the gradients of its sum by hidden, weight and bias, None where not needed)."""
    hidden, weight, _ = student
    acc = reference.accumulation_dtype(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(t, dtype=t.dtype if t is hidden else acc, memory_format=torch.contiguous_format)
        if needed and t is not None else None
        for t, needed in zip(student, needs, strict=True)
    )  # fmt: skip
    divergence = hidden.new_zeros(hidden.shape[0], dtype=acc)
    counted = _counted_rows(student, weights)
    columns = _columns(student, setting)
    step = _rows_at_once(student, teacher, setting, needs[1] or needs[2])
    for part in slices(hidden.shape[0] if counted is None else len(counted), step):
        rows = part if counted is None else counted[part]
        w = None if weights is None else weights[rows]
        h = hidden[rows]
        if w is not None and counted is None:  # an ignored row may hold NaN, and 0·NaN is none of its business
            h = h.masked_fill((w == 0)[:, None], 0.0)
        products = student._replace(hidden=h).products(slice(None))
        divergence[rows], dp = _divergence_and_gradient(products, teacher.products(rows), w, setting, any(needs))
        del products
        if not any(needs):
            continue
        if d_hidden is not None:
            d_hidden[rows] = dp @ weight
        for begin in range(0, dp.shape[1], columns):  # a sum or a product of 16-bit numbers may copy them first
            here = slice(begin, begin + columns)
            if d_weight is not None:
                d_weight[here] += wide_product(dp[:, here].t(), h)
            if d_bias is not None:
                d_bias[here] += dp[:, here].sum(0, dtype=acc)
        del dp
    grads = (d_hidden, d_weight, d_bias)
    return divergence, [None if d is None else d.to(t.dtype) for d, t in zip(grads, student, strict=True)]  # type: ignore[union-attr]


def _counted_rows(student: Side, weights: Tensor | None) -> Tensor | None:
    """The rows that are not ignored; None where all are, or where their number is not to be read."""
    if weights is None or weights.device.type != "cpu" or not is_eager(*student, weights):
        return None
    counted = weights.nonzero()[:, 0]
    return None if len(counted) == len(weights) else counted


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, weight, bias, teacher, weights, setting, reduced, needs
    ):
        student = Side(hidden, weight, bias)
        ctx.again = not reduced and (needs[1] or needs[2])
        with torch.autocast(hidden.device.type, enabled=False):
            divergence, grads = _pass(student, teacher, weights, setting, (False,) * 3 if ctx.again else needs)
        ctx.grads = grads
        if ctx.again:
            ctx.save_for_backward(*student, *teacher, weights)
            ctx.setting, ctx.needs = setting, needs
        return divergence.sum() if reduced else divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        if ctx.again:
            student, teacher = Side(*ctx.saved_tensors[:3]), Side(*ctx.saved_tensors[3:6])
            weights = ctx.saved_tensors[6]
            weights = upstream.contiguous() if weights is None else weights * upstream
            with torch.autocast(student.hidden.device.type, enabled=False):
                return *_pass(student, teacher, weights, ctx.setting, ctx.needs)[1], *[None] * 5
        if ctx.grads is None:
            raise RuntimeError("linear_kl_div: a second backward needs retain_graph=True in the first one")
        factor = upstream if upstream.dim() == 0 else upstream[:, None]
        kept, grads = graph_is_kept(upstream), ctx.grads
        if not kept:
            ctx.grads = None
        scaled = [None if g is None else (g * factor).to(g.dtype) if kept else g.mul_(factor) for g in grads]
        return *scaled, *[None] * 5
