"""The losses of an intervention from hidden states: no [N, V] tensor is ever whole.

With z = s·(W·h + b), q = softmax(z) over the kept columns, and of the frozen model's hidden states, once and for all,
μ₀ = Wᵀp₀ (d floats per row) and the entropy of p₀:
    KL(p₀ ‖ q) = log Σ exp(z) − s·(h·μ₀ + b·p₀) − H(p₀)          dKL/dh = s·(Wᵀq − μ₀)
One primitive (`linear_softmax`) gives both sides' numbers, so the KL of a row to itself is exactly 0: with the C++
backend in every batch, elsewhere where both sides came from the same rows in one call with the same chunk_bytes, since
the last bit of a matrix product depends on its shape. W is frozen, therefore the gradient of h is known in the forward
pass, and the backward pass scales it row by row with the upstream gradients; the hinge adds two rows of W. Saved:
[N, d] floats.

Where these identities do not hold (a soft-cap, the reverse KL, a W that learns) the reference keeps its logits, and the
loss goes over both some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..once_differentiable import once_differentiable
from ..reference import l1_norm
from ..torch_internals import is_eager
from .intervention_loss import KLDirection, check_answers, intervention_loss, is_reverse
from .learned_head import Setting, learned_head_loss
from .linear_logits import chunks, logits_of
from .linear_softmax import CHUNK_BYTES, linear_softmax
from .reference_statistics import ReferenceStatistics, centred, check_head, expected_logit, unit_stride


def linear_intervention_loss(
    hidden: Tensor,
    weight: Tensor,
    reference: ReferenceStatistics,
    correct: Tensor,
    wrong: Tensor,
    *,
    direction: Tensor,
    margin: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    exclude_answers: bool = True,
    kl: KLDirection = "forward",
    scalars: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, ...]:
    """`intervention_loss` of the logits softcap·tanh(logit_scale·(W·h + b)/softcap), without the logits.

    Args:
        hidden: [N, d], the last hidden states under the intervention, as the head takes them.
        weight: [V, d], the head, of hidden's dtype. One that requires a gradient, as `model.lm_head.weight` does by
            default, gets it, from a reference with [N, V] logits and from logits recomputed in the backward pass:
            pass weight.detach() where the head is frozen.
        reference: `reference_statistics` of the same rows, head and options.
        correct, wrong: int64 [N], the token ids c and w; different in each row.
        direction: [N] of ±1, the sign of the strength each row was run with.
        margin: m, in logits.
        bias, softcap, logit_scale: of the head, as in `reference_statistics`.
        exclude_answers: leave c and w out of the KL and renormalise; False: all of V.
        kl: "forward" KL(p₀ ‖ p_s) or "reverse" KL(p_s ‖ p₀), in nats.
        scalars: the learned scalars, any shape; adds a third result.
        chunk_bytes: extra memory of each pass beside [N, d] results, at most (at least one row of logits). The C++
            backend's own buffers stay below 64 MiB.

    Returns:
        (effectiveness [N], faithfulness [N]) or (effectiveness [N], faithfulness [N], ‖scalars‖₁ []), float32
        (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, or a reference made with other options; on CPU also
            a token id out of range, equal answers, answers other than those that the reference leaves out, and a
            direction other than ±1.

    Once differentiable; torch.func transforms are not supported. Outside the C++ backend float32 products are PyTorch's
    and follow `torch.set_float32_matmul_precision`: TF32 where that allows it.
    """
    correct, wrong = check_head(hidden, weight, bias, correct, wrong, softcap, logit_scale, chunk_bytes)
    softcap = None if softcap is None else float(softcap)
    direction = checks.row_values("direction", direction, hidden.shape[0], hidden.device)
    if scalars is not None:
        checks.same_device("scalars", checks.floating_tensor("scalars", scalars, "of any shape"), hidden.device)
    margin, reverse = checks.number("margin", margin), is_reverse(kl)
    check_answers(correct, wrong, direction, weight.shape[0])
    _check_reference(reference, hidden, weight, exclude_answers, logit_scale, softcap)
    _check_same_answers(reference, correct, wrong)
    head_learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    by_logits = softcap is not None or reverse or head_learns or reference.mean is None
    if by_logits and reference.logits is None:
        reason = "the reverse KL" if reverse else "a head that learns"  # with a soft-cap they are always there
        raise ValueError(
            f"reference: got statistics without logits, which {reason} needs; expected"
            " reference_statistics(..., keep_logits=True)"
        )
    options = {"margin": margin, "exclude_answers": exclude_answers}
    head = (weight, bias, softcap, float(logit_scale))
    if head_learns or (by_logits and torch.compiler.is_compiling()):  # a graph differentiates the logits itself
        setting = Setting(softcap, float(logit_scale), chunk_bytes, {**options, "kl": kl})
        losses = learned_head_loss(hidden, weight, bias, reference.logits, correct, wrong, direction, setting)  # type: ignore[arg-type]
    else:
        losses = _LinearLoss.apply(
            hidden, head, reference, correct, wrong, direction, chunk_bytes, by_logits, {**options, "kl": kl},
            hidden.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
    return losses if scalars is None else (*losses, l1_norm(scalars))


def _check_reference(
    statistics: object, hidden: Tensor, weight: Tensor, exclude: bool, logit_scale: float, softcap: float | None
) -> None:
    if not isinstance(statistics, ReferenceStatistics):
        raise TypeError(f"reference: got {type(statistics).__name__}, expected ReferenceStatistics")
    if len(statistics) != hidden.shape[0]:
        raise ValueError(f"reference: got {len(statistics)} rows, expected {hidden.shape[0]} as hidden has")
    for name, made, used in (
        ("exclude_answers", statistics.exclude_answers, exclude),
        ("logit_scale", statistics.logit_scale, float(logit_scale)),
        ("softcap", statistics.softcap, softcap),
    ):
        if made != used:
            raise ValueError(f"{name}: got {used}, expected {made} as the reference was made with")
    checks.same_device("reference", statistics.correct, hidden.device)
    for tensor, width in ((statistics.mean, weight.shape[1]), (statistics.logits, weight.shape[0])):
        if tensor is not None:
            checks.same_device("reference", tensor, hidden.device)
            if tensor.shape[1] != width:
                raise ValueError(f"reference: got statistics of width {tensor.shape[1]}, expected {width}")


def _check_same_answers(statistics: ReferenceStatistics, correct: Tensor, wrong: Tensor) -> None:
    """Refuses a p₀ that leaves out other tokens; reads CPU tensors alone. Which of the two is correct may change."""
    if statistics.mean is None or not statistics.exclude_answers or correct.device.type != "cpu":
        return
    if not is_eager(correct, wrong, statistics.correct, statistics.wrong):
        return
    for name, ids in (("correct", correct), ("wrong", wrong)):
        for row in ((ids != statistics.correct) & (ids != statistics.wrong)).nonzero().flatten().tolist():
            made = f"{int(statistics.correct[row])} or {int(statistics.wrong[row])}"
            raise ValueError(
                f"{name}: row {row} has token id {int(ids[row])}, expected {made} as the reference was made without"
            )


class _LinearLoss(torch.autograd.Function):
    """Frozen head: (effectiveness, faithfulness); the gradient of hidden is made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, head, reference, correct, wrong, direction, chunk_bytes, by_logits, options, need_grad
    ):
        compute = _by_logits if by_logits else by_statistics
        effectiveness, faithfulness, d_faithfulness, d_answers = compute(
            hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, **options
        )
        if need_grad:
            ctx.save_for_backward(d_faithfulness, d_answers, correct, wrong, head[0])
            ctx.dtype = hidden.dtype
        return effectiveness, faithfulness

    @staticmethod
    @once_differentiable("linear_intervention_loss")
    def backward(ctx: Any, d_effectiveness, d_faithfulness):  # type: ignore[no-untyped-def]
        faithfulness_grad, answers_grad, correct, wrong, weight = ctx.saved_tensors
        d_hidden = d_faithfulness[:, None] * faithfulness_grad
        for ids, answer_grad in ((correct, answers_grad[:, 0]), (wrong, answers_grad[:, 1])):
            factor = d_effectiveness * answer_grad  # NaN where an id is out of range
            of_answers = weight.detach()[ids.clamp(0, weight.shape[0] - 1)].to(factor.dtype)  # [N, d]
            d_hidden.addcmul_(factor[:, None], of_answers)
            del of_answers
        return d_hidden.to(ctx.dtype), *[None] * 9


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """`linear_softmax` with any bias."""
    return linear_softmax(hidden, weight, centred(bias), *arguments)


def by_statistics(  # type: ignore[no-untyped-def]
    hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, *, margin, exclude_answers, kl,
    softmax: Callable[..., tuple[Tensor, ...]] = _softmax,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(effectiveness, faithfulness, d faithfulness/dh [N, d], d effectiveness/d(W·h) at the two answers [N, 2])."""
    weight, bias, _, scale = head
    log_sum, mean, _, answers = softmax(
        unit_stride(hidden.detach()), unit_stride(weight.detach()), bias, correct, wrong, exclude_answers, scale,
        chunk_bytes,
    )  # fmt: skip
    expected = expected_logit(hidden, reference.mean, reference.mean_bias, scale, chunk_bytes)
    divergence = log_sum - expected - reference.entropy
    # Below 0 it is rounding; log_sum is −inf where no token is left.
    divergence = divergence.clamp(min=0).masked_fill(log_sum == -torch.inf, 0.0)
    missing = margin - direction.to(answers.dtype) * (answers[:, 0] - answers[:, 1])
    effectiveness = missing.clamp(min=0)
    if not need_grad:
        return effectiveness, divergence.to(answers.dtype), None, None
    slope = -direction.to(answers.dtype) * torch.where(missing.isnan(), missing, (missing > 0).to(missing.dtype))
    return (
        effectiveness,
        divergence.to(answers.dtype),
        mean.sub_(reference.mean).mul_(scale),
        scale * torch.stack([slope, -slope], 1),
    )


def _by_logits(  # type: ignore[no-untyped-def]
    hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, *, margin, exclude_answers, kl
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `by_statistics`, from logits of some rows at a time."""
    weight, bias, softcap, scale = head
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    parts = []
    for rows in chunks(hidden, weight, softcap, chunk_bytes):
        h = hidden[rows].detach().requires_grad_(need_grad)
        with torch.set_grad_enabled(need_grad):
            logits = logits_of(h, weight, bias, softcap, scale)
            effectiveness, faithfulness = intervention_loss(
                logits, reference.logits[rows], correct[rows], wrong[rows], direction=direction[rows],
                margin=margin, exclude_answers=exclude_answers, kl=kl,
            )  # fmt: skip
            if not need_grad:
                del logits
                parts.append([effectiveness, faithfulness])
                continue
            (d_hidden,) = torch.autograd.grad(faithfulness.sum(), h)
        effectiveness, faithfulness = effectiveness.detach(), faithfulness.detach()
        columns = torch.stack([correct[rows], wrong[rows]], 1).clamp(0, weight.shape[0] - 1)
        answers = logits.detach().gather(1, columns).to(effectiveness.dtype)
        del logits
        steepness = scale * (1 - (answers / softcap) ** 2) if softcap is not None else torch.full_like(answers, scale)
        slope = -direction[rows].to(answers.dtype) * (effectiveness > 0)
        slope = torch.where(effectiveness.isnan(), effectiveness, slope)
        sides = torch.stack([slope, -slope], 1)
        parts.append([effectiveness, faithfulness, d_hidden.to(answers.dtype), steepness * sides])
    joined = tuple(torch.cat(column).detach() for column in map(list, zip(*parts, strict=True)))
    return joined if need_grad else (*joined, None, None)  # type: ignore[return-value]
