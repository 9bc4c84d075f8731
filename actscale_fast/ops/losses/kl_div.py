"""The KL divergence of two tensors of logits as trainers use it: temperature, soft-cap, ignored rows, reductions.

With u(z) = s·tanh(z/s) (s: the soft-cap, or u(z) = z), q = softmax(u(z)/T), p = softmax(u(r)/T) and a weight w a row:
    forward  w·Σ p (log p − log q)     d/dz = w/T·(q − p)·du/dz
    reverse  w·Σ q (log q − log p)     d/dz = w/T·q·(log q − log p − KL)·du/dz
The reduction is part of the weights (1/Σw for a mean), so the gradient that the fused kernel writes in the forward pass
is the loss's own, and an upstream of 1 leaves it as it is. Bytes a logit of b bytes: 3·b (both logits read, the
gradient written), b where the row is ignored; an upstream other than 1 costs 2·b more.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backends, checks, reference
from .intervention_loss import KLDirection, check_logits, check_overwritable, fused_losses, is_reverse

Reduction = Literal["none", "sum", "mean", "batchmean"]


def kl_div_from_logits(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "none",
    kl: KLDirection = "forward",
    softcap: float | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | float | None = None,
    inplace_gradient: bool = False,
) -> Tensor:
    """KL divergence between the softmaxes of two logit tensors, row by row, with the gradient of `logits` in one pass.

    Args:
        logits: [..., V], the student's or steered logits.
        reference_logits: [..., V], the teacher's or frozen logits; constant (no gradient).
        temperature: T > 0, of which T and 1/T are float32 numbers; both sides are softmax(logits / T).
        reduction: "none": w·KL, [...]; "sum": Σ w·KL; "mean" and "batchmean": Σ w·KL / Σ w, over the rows that are not
            ignored. Where Σ w is 0, as with no row left, the mean is 0 and so is its gradient.
        kl: "forward" KL(reference ‖ logits), as `F.kl_div` computes it, or "reverse" KL(logits ‖ reference), in nats.
        softcap: s; both sides' logits become s·tanh(z/s), in float32, before the temperature. None: as they are.
        labels: int64 [...]; rows whose label is `ignore_index` count 0, are not read, whatever they hold (NaN too), and
            get a gradient of exactly 0.
        ignore_index: that label.
        row_weight: w, a number or a tensor that broadcasts to [...] (a 0/1 mask too); constant. A row of weight 0 is an
            ignored one.
        inplace_gradient: let the gradient overwrite the logits, as in `intervention_loss`.

    Returns:
        float32 (float64 for float64 inputs), of shape [...] or [].

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, temperature, soft-cap or reduction.

    What other losses of this kind do differently, and a trainer that moves here has to know:
        - T²: the result is not multiplied by it, and gradients shrink as 1/T²: distillation usually multiplies.
          Any factor is free as row_weight with "sum" (not in float16, see below); multiplied to the result it is a
          second pass over the gradient.
        - Soft-cap: models that have one (Gemma 2: 30) return capped logits. Give `softcap` for raw logits alone:
          capping twice is another distribution. The cap takes −inf to −s, a possible token: mask after it.
        - Hard labels: `labels` only say which rows count. Cross-entropy on them, and its weight, are the caller's.
        - Mean: over rows (tokens), never over V as `F.kl_div`'s "mean"; with all rows ignored 0, not NaN.
        - Direction: "forward" is F.kl_div(log q, log p), beta = 0 of TRL's GKDTrainer; "reverse" its beta = 1.
        - Shift labels, not logits: logits[:, :-1] would be copied to become rows, labels padded at the end are not.
        - float16: row weights and a mean's 1/Σw are applied to the finished gradient in a second pass, together with
          the loss scale: float16 would lose small gradients to a factor such as T²/n before a loss scale could save
          them, and overflow under a large one.

    Once differentiable (float64: any number of times); torch.func transforms are not supported.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise TypeError(f"logits: got {getattr(logits, 'shape', type(logits).__name__)}, expected a tensor [..., V]")
    inverse_temperature, reverse, softcap = check_options(temperature, reduction, kl, softcap)
    leading, width = logits.shape[:-1], logits.shape[-1]
    if checks.floating_tensor("reference_logits", reference_logits, "[..., V]").shape != logits.shape:
        raise ValueError(f"reference_logits: got shape {tuple(reference_logits.shape)}, expected {tuple(logits.shape)}")
    z = logits if logits.dim() == 2 else logits.reshape(leading.numel(), width)
    r = reference_logits if logits.dim() == 2 else reference_logits.reshape(leading.numel(), width)
    check_logits(z, r)
    if inplace_gradient:
        check_overwritable(logits, reference_logits)
    weights = row_weights(labels, ignore_index, row_weight, leading, z)
    weights, of_rows, factor = reduced_weights(weights, reduction, z)
    divergence = weighted_divergence(z, r, weights, inverse_temperature, reverse, softcap, in_place=inplace_gradient)
    divergence = divergence if of_rows is None else divergence * of_rows
    divergence = divergence.reshape(leading) if reduction == "none" else divergence.sum()
    return divergence if factor is None else divergence * factor


def weighted_divergence(
    logits: Tensor, reference_logits: Tensor, weights: Tensor | None, inverse_temperature: float, reverse: bool,
    softcap: float | None, *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """w·KL of each row [N], differentiable with respect to the logits [N, V]."""
    if backends.serving("intervention_loss", logits) == "reference":
        return reference.intervention_loss(
            logits, reference_logits, None, None, None, inverse_temperature=inverse_temperature, reverse=reverse,
            row_weight=weights, softcap=softcap,
        )[1]  # fmt: skip
    return fused_losses(
        logits, reference_logits, inverse_temperature=inverse_temperature, reverse=reverse, row_weight=weights,
        softcap=softcap, in_place=in_place,
    )[1]  # fmt: skip


def check_options(
    temperature: float, reduction: str, kl: str, softcap: float | None
) -> tuple[float, bool, float | None]:
    """(inverse temperature, whether the KL is the reverse one, soft-cap)."""
    inverse_temperature = checks.positive("1 / temperature", 1.0 / checks.positive("temperature", temperature))
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'none', 'sum', 'mean' or 'batchmean'")
    return inverse_temperature, is_reverse(kl), None if softcap is None else checks.positive("softcap", softcap)


def row_weights(
    labels: Tensor | None, ignore_index: int, row_weight: Tensor | float | None, shape: torch.Size, like: Tensor
) -> Tensor | None:
    """The weight of each row, [N] in the accumulation dtype of `like`, 0 where it is ignored; None where all are 1."""
    acc = reference.accumulation_dtype(like.dtype)
    weights: Tensor | None = None
    if isinstance(row_weight, Tensor):
        if row_weight.dtype.is_complex:
            raise TypeError(f"row_weight: got dtype {row_weight.dtype}, expected real numbers")
        if row_weight.requires_grad:
            raise ValueError("row_weight: requires a gradient, but it is not differentiated")
        if row_weight.dim() == 0:
            row_weight = row_weight.to(like.device)
        checks.same_device("row_weight", row_weight, like.device)
        if not _broadcasts(row_weight.shape, shape):
            raise ValueError(
                f"row_weight: got shape {tuple(row_weight.shape)}, expected one that broadcasts to {tuple(shape)}"
            )
        weights = row_weight.to(acc).expand(shape).reshape(shape.numel()).contiguous()
    elif row_weight is not None:
        weights = like.new_full((shape.numel(),), checks.number("row_weight", row_weight), dtype=acc)
    if labels is None:
        return weights
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected an int64 tensor {list(shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: got dtype {labels.dtype}, expected int64")
    checks.same_device("labels", labels, like.device)
    if labels.shape != shape:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {tuple(shape)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int")
    ignored = labels.reshape(shape.numel()) == ignore_index
    return (~ignored).to(acc) if weights is None else weights.masked_fill(ignored, 0.0)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def reduced_weights(
    weights: Tensor | None, reduction: str, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | float | None]:
    """(weights of the kernel, a factor for each row's result or None, one for the reduced result or None).

    Weights of the kernel are part of the finished gradient, which in float16 holds neither 1/Σw nor weights of very
    different sizes: there they only say which rows count, and the factors reach the gradient as its upstream.
    """
    mean = reduction in ("mean", "batchmean")
    if like.dtype == torch.float16:
        if weights is None:
            return None, None, 1 / max(like.shape[0], 1) if mean else None
        return (weights != 0).to(weights.dtype), weights, _inverse(weights.sum()) if mean else None
    if not mean:
        return weights, None, None
    if weights is None:
        acc = reference.accumulation_dtype(like.dtype)
        return like.new_full((like.shape[0],), 1 / max(like.shape[0], 1), dtype=acc), None, None
    total = weights.sum()
    return (weights / total).masked_fill(total == 0, 0.0), None, None


def _inverse(total: Tensor) -> Tensor:
    """1/Σw, 0 where Σw is 0."""
    return (1 / total).masked_fill(total == 0, 0.0)
