"""The KL divergence of two models' next tokens from their hidden states: no [N, V] tensor is ever whole.

For some rows at a time: both heads' products P = W·h + b, the fused kernel of `kl_div`, which writes dP over P, and
    dh = dP·W,   dW = Σ_chunks dPᵀ·h,   db = Σ_chunks Σ_rows dP
so a step is the two products of the logits and one for each gradient, all in the forward pass; the backward pass
multiplies by the upstream gradient. Only where losses of single rows go on and a head learns, dW is not yet known: the
backward pass then recomputes the chunk's logits. The head's scale g needs no pass of its own: with z = g·P,
    u(z)/T = g/T·(s/g)·tanh(P/(s/g)),
the kernel's own form at the inverse temperature g/T and the soft-cap s/g. dW and db are added in float32 (float64 for
float64) and rounded once. Saved: the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_counts
from .. import checks
from .intervention_loss import KLDirection
from .kl_div import Reduction, check_options, reduced_weights, row_weights
from .linear_kl_passes import LinearKL, Setting, Side, traced
from .linear_softmax import CHUNK_BYTES


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
        chunk_bytes: extra memory beside the gradients, at most (at least one row of both models' logits). A 16-bit
            head that learns takes 4·V·d bytes more, in which its gradient is added up: until it is rounded at the end
            of the forward pass; float16, and with reduction "none" every 16-bit head, in the backward pass.

    Returns:
        float32 (float64 for float64 inputs), of shape [...] or [].

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, temperature, soft-cap or reduction.

    Logits are rounded to hidden's dtype as a model's are, whatever autocast says; float32 products follow
    `torch.set_float32_matmul_precision`. With reduction "none" and a head that learns the logits are made twice. What
    `kl_div_from_logits` says of T², the soft-cap, hard labels and float16 holds here too.

    Under torch.compile each chunk's part of a 16-bit head's gradient is rounded to 16 bits before it is added up in
    float32, and the head itself is copied to float32 for that: with their sum and a chunk's part of it that is up to
    4·4·V·d bytes beside the chunk, of a float32 head 2·4·V·d.

    Once differentiable; torch.func transforms are not supported.
    """
    inverse_temperature, reverse, softcap = check_options(temperature, reduction, kl, softcap)
    scale = checks.positive("logit_scale", logit_scale)
    inverse_temperature = checks.positive("logit_scale / temperature", inverse_temperature * scale)
    if softcap is not None:
        softcap = checks.positive("softcap / logit_scale", softcap / scale)
    check_counts(chunk_bytes=chunk_bytes)
    checks.head(hidden, weight, bias, rows="...")
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias: got one without reference_weight, whose head's it is; expected None")
        reference_weight, reference_bias = weight, bias
    checks.head(reference_hidden, reference_weight, reference_bias, rows="...", prefix="reference_")
    student, teacher = Side(hidden, weight, bias), Side(reference_hidden, reference_weight, reference_bias)
    _check_sides(student, teacher)
    teacher = Side(*(None if t is None else t.detach() for t in teacher))  # type: ignore[arg-type]
    leading = hidden.shape[:-1]
    rows = Side(hidden.reshape(leading.numel(), hidden.shape[-1]), weight, bias)
    others = teacher._replace(hidden=teacher.hidden.reshape(leading.numel(), teacher.hidden.shape[-1]))
    weights = row_weights(labels, ignore_index, row_weight, leading, rows.hidden)
    weights, of_rows, factor = reduced_weights(weights, reduction, rows.hidden)
    setting = Setting(inverse_temperature, reverse, softcap, chunk_bytes)
    reduced = reduction != "none"
    if torch.compiler.is_compiling():  # a graph plans what it keeps and what it makes again
        losses = traced(rows, others, weights, setting)
        losses = losses if of_rows is None else losses * of_rows
        losses = losses.sum() if reduced else losses
    else:
        needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in rows)
        losses = LinearKL.apply(*rows, others, weights, of_rows if reduced else None, setting, reduced, needs)
        losses = losses if reduced or of_rows is None else losses * of_rows
    losses = losses if reduced else losses.reshape(leading)
    return losses if factor is None else losses * factor


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
