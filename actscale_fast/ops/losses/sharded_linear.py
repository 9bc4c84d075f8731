"""`linear_intervention_loss` where every process holds some rows of W: no process has all logits of a row.

The processes run on the same hidden states. With the rows W_r of process r, and of its part of the vocabulary
L_r = log Σ_r exp(z) and m_r = Wᵀ_r·softmax_r(z), which `linear_softmax` gives,
    log Σ exp(z) = log Σ_r exp(L_r),   Wᵀq = Σ_r exp(L_r − log Σ exp(z))·m_r
and likewise q·b; an answer's logit and its row of W come from the process that holds them. So a loss sends, per row, a
maximum, four sums and two vectors [d], and the gradient of h is whole in every process.

An answer is left out of the softmax of the process that holds it. The kernels leave out two columns of a row or none:
where a process holds neither answer, its first column is left out, and added again with the parts of the others.

With a soft-cap and for the reverse KL, the sums over the vocabulary are those of `reference.kl_divergence`; each
process keeps the frozen model's logits of its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..once_differentiable import once_differentiable
from ..reference import accumulation_dtype
from .intervention_loss import KLDirection, is_reverse
from .linear_intervention_loss import by_statistics
from .linear_logits import logits_of
from .linear_softmax import CHUNK_BYTES, inner_products, linear_softmax, sums_of_rows
from .reference_statistics import ReferenceStatistics, expected_logit, unit_stride
from .vocabulary_shard import VocabularyShard


@torch.no_grad()
def sharded_reference_statistics(
    hidden: Tensor,
    weight: Tensor,
    correct: Tensor,
    wrong: Tensor,
    shard: VocabularyShard,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    exclude_answers: bool = True,
    kl: KLDirection = "forward",
    chunk_bytes: int = CHUNK_BYTES,
) -> ReferenceStatistics:
    """`reference_statistics` where each process holds some rows of W; a collective operation.

    Args:
        hidden: [N, d], alike in all processes.
        weight, bias: [V_r, d] and [V_r], of the own part.
        correct, wrong: int64 [N], ids in the whole vocabulary.
        shard: the own part.
        softcap, logit_scale, exclude_answers, kl, chunk_bytes: as in `reference_statistics`.

    Returns:
        Statistics alike in all processes; or, with a soft-cap and for the reverse KL, logits [N, V_r] of the own part.
    """
    _check_ids(correct, wrong, shard)
    common = (correct.clone(), wrong.clone(), exclude_answers, float(logit_scale), softcap)
    if softcap is not None or is_reverse(kl):
        logits = hidden.new_empty(hidden.shape[0], shard.count)
        for rows in shard.slices(hidden, chunk_bytes):
            logits[rows] = logits_of(hidden[rows], weight, bias, softcap, logit_scale)
        return ReferenceStatistics(None, None, None, logits, *common)
    log_sum, mean, mean_bias, _ = _softmax(shard)(
        unit_stride(hidden), unit_stride(weight), bias, correct, wrong, exclude_answers, float(logit_scale), chunk_bytes
    )
    entropy = log_sum - expected_logit(hidden, mean, mean_bias, logit_scale, chunk_bytes)
    return ReferenceStatistics(mean, mean_bias, entropy, None, *common)


def sharded_intervention_loss(
    hidden: Tensor,
    weight: Tensor,
    reference: ReferenceStatistics,
    correct: Tensor,
    wrong: Tensor,
    shard: VocabularyShard,
    *,
    direction: Tensor,
    margin: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    exclude_answers: bool = True,
    kl: KLDirection = "forward",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`linear_intervention_loss` of a frozen W of which each process holds some rows; a collective operation.

    Args:
        hidden, weight, bias, correct, wrong, shard: as in `sharded_reference_statistics`.
        reference: its result.
        direction, margin, softcap, logit_scale, exclude_answers, kl, chunk_bytes: as in `linear_intervention_loss`.

    Returns:
        (effectiveness [N], faithfulness [N]), alike in all processes, as is the gradient of `hidden`.
    """
    _check_ids(correct, wrong, shard)
    head = (weight.detach(), None if bias is None else bias.detach(), softcap, float(logit_scale))
    options = {"margin": float(margin), "exclude_answers": exclude_answers, "kl": kl}
    need_grad = hidden.requires_grad and torch.is_grad_enabled()
    return _ShardedLoss.apply(  # type: ignore[no-any-return]
        hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, shard, options
    )


def _check_ids(correct: Tensor, wrong: Tensor, shard: VocabularyShard) -> None:
    for name, ids in (("correct", correct), ("wrong", wrong)):
        checks.ids_in_range(name, ids, shard.vocab, "token id")


class _ShardedLoss(torch.autograd.Function):
    """(effectiveness, faithfulness); both gradients of hidden are made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, shard, options
    ):
        hidden = hidden.detach()
        if reference.mean is not None:
            effectiveness, faithfulness, d_faithfulness, d_answers = by_statistics(
                hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, softmax=_softmax(shard),
                **options,
            )  # fmt: skip
        else:
            effectiveness, faithfulness, d_faithfulness, d_answers = _by_logits(
                hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, shard, **options
            )
        if d_faithfulness is not None and d_answers is not None:
            d_effectiveness = torch.zeros_like(d_faithfulness)
            for ids, factor in ((correct, d_answers[:, 0]), (wrong, d_answers[:, 1])):
                local, inside = shard.own(ids)
                if shard.count:
                    rows = head[0][local].to(factor.dtype)  # [N, d]
                    d_effectiveness += torch.where(inside[:, None], factor[:, None] * rows, 0.0)
            ctx.save_for_backward(shard.sum_(d_effectiveness), d_faithfulness)
            ctx.dtype = hidden.dtype
        return effectiveness, faithfulness

    @staticmethod
    @once_differentiable("the loss of a sharded head")
    def backward(ctx: Any, upstream_effectiveness, upstream_faithfulness):  # type: ignore[no-untyped-def]
        d_effectiveness, d_faithfulness = ctx.saved_tensors
        d_hidden = upstream_faithfulness[:, None] * d_faithfulness
        d_hidden.addcmul_(upstream_effectiveness[:, None], d_effectiveness)
        return d_hidden.to(ctx.dtype), *[None] * 9


def _softmax(shard: VocabularyShard) -> Any:
    """`linear_softmax` of the whole vocabulary, whose bias need not be centred."""

    def softmax(  # type: ignore[no-untyped-def]
        hidden, weight, bias, correct, wrong, exclude_answers, logit_scale, chunk_bytes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if bias is not None:
            bias = _centred(bias, shard)
        parts = _parts(hidden, weight, bias, correct, wrong, exclude_answers, logit_scale, chunk_bytes, shard)
        largest = shard.largest_(torch.stack([log_sum for log_sum, *_ in parts[0]]).amax(0))
        largest = largest.masked_fill(largest == -torch.inf, 0.0)  # no column is kept
        sums = hidden.new_zeros(hidden.shape[0], 4, dtype=torch.float64)  # Σ exp, Σ exp·(q·b), the answers' logits
        mean = torch.zeros_like(parts[0][0][1])
        for log_sum, own_mean, mean_bias in parts[0]:
            part = (log_sum - largest).exp()
            sums[:, 0] += part
            sums[:, 1] += torch.where(part == 0, 0.0, part * mean_bias)
            mean += torch.where(part == 0, 0.0, part)[:, None].to(mean.dtype) * own_mean
        sums[:, 2:] = parts[1]
        shard.sum_(sums)
        total = sums[:, 0]
        nothing = total == 0
        total = total.masked_fill(nothing, 1.0)
        known = torch.stack([(ids >= 0) & (ids < shard.vocab) for ids in (correct, wrong)]).all(0)
        log_sum = (largest + total.log()).masked_fill(nothing, -torch.inf).masked_fill(~known, torch.nan)
        mean = shard.sum_(mean).div_(total.to(mean.dtype)[:, None])
        answers = sums[:, 2:].to(mean.dtype).masked_fill(~known[:, None], torch.nan)
        return log_sum, mean, sums[:, 1] / total, answers

    return softmax


def _parts(  # type: ignore[no-untyped-def]
    hidden, weight, bias, correct, wrong, exclude_answers, logit_scale, chunk_bytes, shard
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """([(log Σ exp(z), Wᵀq, q·b)] of some columns of this process, z at the answers [N, 2], 0 where another has it)."""
    acc, n_rows = accumulation_dtype(hidden.dtype), hidden.shape[0]
    if not shard.count:
        nothing = hidden.new_zeros(n_rows, dtype=torch.float64)
        mean = hidden.new_zeros(hidden.shape, dtype=acc)
        return [(torch.full_like(nothing, -torch.inf), mean, nothing)], nothing[:, None].expand(-1, 2)
    (c, has_c), (w, has_w) = shard.own(correct), shard.own(wrong)
    # Where one of the two is here, it stands for both.
    columns = torch.where(has_c, c, w), torch.where(has_w, w, c)
    log_sum, mean, mean_bias, answers = linear_softmax(
        hidden, weight, bias, *columns, exclude_answers, logit_scale, chunk_bytes
    )
    parts = [(log_sum, mean, mean_bias)]
    if exclude_answers:  # neither is here: the first column was left out
        product = inner_products(hidden, weight[:1].expand_as(hidden), chunk_bytes)
        of_bias = torch.zeros_like(product) if bias is None else bias[:1].double().expand_as(product)
        z = (logit_scale * (product + of_bias)).masked_fill(has_c | has_w, -torch.inf)
        parts.append((z, weight[:1].to(acc).expand_as(mean), of_bias))
    return parts, torch.where(torch.stack([has_c, has_w], 1), answers.double(), 0.0)


def _centred(bias: Tensor, shard: VocabularyShard) -> Tensor:
    """`reference_statistics.centred` by the largest bias of all processes."""
    wide = bias.detach().to(torch.float64 if bias.dtype == torch.float64 else torch.float32)
    largest = wide.amax() if len(wide) else wide.new_full((), -torch.inf)
    largest = shard.largest_(largest)
    return wide - torch.where(largest.isfinite(), largest, 0.0)


def _by_logits(  # type: ignore[no-untyped-def]
    hidden, head, reference, correct, wrong, direction, chunk_bytes, need_grad, shard, *, margin, exclude_answers, kl
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `by_statistics`, from the own logits of some rows at a time."""
    weight, bias, softcap, scale = head
    acc = accumulation_dtype(hidden.dtype)
    columns = [shard.own(ids) for ids in (correct, wrong)]
    divergences, answers, slopes = [], [], []
    for rows in shard.slices(hidden, chunk_bytes):
        z = logits_of(hidden[rows], weight, bias, softcap, scale).to(acc)  # [R, V_r]
        reference_z = reference.logits[rows].to(acc)
        ids = torch.stack([local[rows] for local, _ in columns], 1)
        here = torch.stack([inside[rows] for _, inside in columns], 1)
        steep = torch.full_like(z, scale) if softcap is None else scale * (1 - (z / softcap) ** 2)
        if shard.count:
            answers.append(z.gather(1, ids).masked_fill(~here, 0.0))
        else:
            answers.append(z.new_zeros(ids.shape))
        if exclude_answers:
            every = torch.arange(shard.count, device=z.device)
            for place in range(2):
                out = here[:, place, None] & (every == ids[:, place, None])
                z, reference_z = z.masked_fill(out, -torch.inf), reference_z.masked_fill(out, -torch.inf)
        divergence, dz = _divergence(z, reference_z, is_reverse(kl), shard)
        divergences.append(divergence)
        if need_grad:
            slopes.append(sums_of_rows((dz * steep).to(weight.dtype), weight, max(shard.count, 1)))
    chosen = shard.sum_(torch.cat(answers))
    faithfulness = torch.cat(divergences).to(acc)
    direction = direction.to(acc)
    missing = margin - direction * (chosen[:, 0] - chosen[:, 1])
    if not need_grad:
        return missing.clamp(min=0), faithfulness, None, None
    slope = -direction * torch.where(missing.isnan(), missing, (missing > 0).to(acc))
    steepness = torch.full_like(chosen, scale) if softcap is None else scale * (1 - (chosen / softcap) ** 2)
    sides = torch.stack([slope, -slope], 1)
    return missing.clamp(min=0), faithfulness, shard.sum_(torch.cat(slopes)), steepness * sides


def _divergence(z: Tensor, reference: Tensor, reverse: bool, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """(the KL divergence of each row [R] in float64, its gradient in the own logits [R, V_r])."""
    lowest = z.new_full((z.shape[0],), -torch.inf)
    largest = shard.largest_(torch.stack([x.amax(1) if x.shape[1] else lowest for x in (z, reference)]))
    z, reference = (
        x - top.masked_fill(top == -torch.inf, 0.0)[:, None] for x, top in zip((z, reference), largest, strict=True)
    )
    e, reference_e = z.exp(), reference.exp()
    weight, other = (e, z - reference) if reverse else (reference_e, reference - z)
    gap = other.masked_fill(weight == 0, 0.0)
    sums = torch.stack([x.sum(1, dtype=torch.float64) for x in (e, reference_e, weight * gap)], 1)
    total, reference_total, mean = shard.sum_(sums).unbind(1)
    nothing = (total == 0) | (reference_total == 0)
    total, reference_total = (x.masked_fill(x == 0, 1.0) for x in (total, reference_total))
    difference = (total / reference_total).log()  # of the two normalisers
    divergence = mean / total - difference if reverse else mean / reference_total + difference
    divergence = divergence.masked_fill(nothing, 0.0)
    q, p = e / total.to(e.dtype)[:, None], reference_e / reference_total.to(e.dtype)[:, None]
    if not reverse:
        return divergence, q - p
    slope = gap - (difference + divergence).to(gap.dtype)[:, None]
    return divergence, (q * slope).masked_fill(q == 0, 0.0)
