"""The losses from hidden states where the head learns too: the logits of some rows at a time, in both passes.

The forward pass keeps its inputs alone. The backward pass makes the logits of each chunk again and takes from them
    dy = d loss/d(W·h + b),   dh = dy·W,   dW = Σ_chunks dyᵀ·h,   db = Σ_chunks Σ_rows dy
dW and db are added in float32 (float64 for float64) and rounded once. Beside the chunk's logits that is [V, d] floats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..once_differentiable import once_differentiable
from ..reference import accumulation_dtype
from .intervention_loss import intervention_loss
from .linear_logits import chunks, logits_of, of_products
from .linear_softmax import wide_product

#: Rows of W whose gradient is made at once.
COLUMNS = 4096


class Setting(NamedTuple):
    """The options that are not tensors."""

    softcap: float | None
    logit_scale: float
    chunk_bytes: int
    options: dict[str, Any]  # margin, exclude_answers, kl


def learned_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_logits: Tensor,
    correct: Tensor,
    wrong: Tensor,
    direction: Tensor,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """(effectiveness [N], faithfulness [N]), differentiable by hidden, weight and bias."""
    arguments = (hidden, weight, bias, reference_logits, correct, wrong, direction, setting)
    # A graph cannot hold the backward's own backward, and plans what it keeps and what it makes again.
    return _traced(*arguments) if torch.compiler.is_compiling() else _LearnedHeadLoss.apply(*arguments)  # type: ignore[no-any-return]


def _traced(hidden, weight, bias, reference_logits, correct, wrong, direction, setting):  # type: ignore[no-untyped-def]
    dtype, acc = weight.dtype, accumulation_dtype(weight.dtype)
    # A graph adds the chunks' gradients up in the dtype of what they are gradients of.
    wide, wide_bias = (t.to(acc) if t is not None and t.requires_grad else t for t in (weight, bias))

    def of_rows(h, reference_rows, c, w, s):  # type: ignore[no-untyped-def]
        logits = logits_of(h, wide.to(dtype), wide_bias, setting.softcap, setting.logit_scale)
        return intervention_loss(logits, reference_rows, c, w, direction=s, **setting.options)

    parts = [
        checkpoint(
            of_rows, hidden[rows], reference_logits[rows], correct[rows], wrong[rows], direction[rows],
            use_reentrant=False,
        )
        for rows in chunks(hidden, weight, setting.softcap, setting.chunk_bytes)
    ]  # fmt: skip
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _LearnedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, weight, bias, reference_logits, correct, wrong, direction, setting
    ):
        ctx.save_for_backward(hidden, weight, bias, reference_logits, correct, wrong, direction)
        ctx.setting = setting
        parts = []
        for rows in chunks(hidden, weight, setting.softcap, setting.chunk_bytes):
            logits = logits_of(hidden[rows], weight, bias, setting.softcap, setting.logit_scale)
            parts.append(
                intervention_loss(
                    logits, reference_logits[rows], correct[rows], wrong[rows], direction=direction[rows],
                    **setting.options,
                )
            )  # fmt: skip
            del logits
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable("linear_intervention_loss")
    def backward(ctx: Any, *upstream):  # type: ignore[no-untyped-def]
        hidden, weight, bias, reference_logits, correct, wrong, direction = ctx.saved_tensors
        softcap, scale, chunk_bytes, options = ctx.setting
        acc = accumulation_dtype(weight.dtype)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(t, dtype=t.dtype if t is hidden else acc, memory_format=torch.contiguous_format)
            if needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )  # fmt: skip
        for rows in chunks(hidden, weight, softcap, chunk_bytes):
            products = logits_of(hidden[rows], weight, bias, None, 1.0).requires_grad_()
            with torch.enable_grad():
                losses = intervention_loss(
                    of_products(products, softcap, scale), reference_logits[rows], correct[rows], wrong[rows],
                    direction=direction[rows], **options,
                )  # fmt: skip
            (dy,) = torch.autograd.grad(losses, products, [u[rows] for u in upstream])
            del products, losses
            if d_hidden is not None:
                torch.mm(dy, weight, out=d_hidden[rows])
            for begin in range(0, dy.shape[1], COLUMNS):  # a sum or a product of 16-bit numbers may copy them first
                columns = slice(begin, begin + COLUMNS)
                if d_weight is not None:
                    d_weight[columns] += wide_product(dy[:, columns].t(), hidden[rows])
                if d_bias is not None:
                    d_bias[columns] += dy[:, columns].sum(0, dtype=acc)
        grads = (
            None if d is None else d.to(t.dtype)
            for d, t in zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
        )  # fmt: skip
        return *grads, None, None, None, None, None
