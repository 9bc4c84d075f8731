"""What the losses from hidden states need to know of the frozen model, computed once: d floats per row instead of V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import check_counts
from .. import backends, checks
from .intervention_loss import KLDirection, is_reverse
from .linear_logits import logits_in_chunks
from .linear_softmax import CHUNK_BYTES, inner_products, linear_softmax


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class ReferenceStatistics:
    """The frozen model's next-token distributions p₀ of N rows, as `reference_statistics` makes them.

    Either `mean`, `mean_bias` and `entropy`, or `logits` where these do not suffice. `statistics[rows]` picks rows,
    `to(device)` moves them.
    """

    mean: Tensor | None  # [N, d] float32, μ₀ = Wᵀp₀
    mean_bias: Tensor | None  # [N] float64, (b − max b)·p₀
    entropy: Tensor | None  # [N] float64, H(p₀) in nats
    logits: Tensor | None  # [N, V]
    correct: Tensor  # [N] int64, the answers that were left out of p₀, or would have been
    wrong: Tensor  # [N] int64
    exclude_answers: bool
    logit_scale: float
    softcap: float | None

    def __len__(self) -> int:
        return self.correct.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> ReferenceStatistics:
        """The statistics of some rows: a slice or an index tensor."""
        return self.each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> ReferenceStatistics:
        return self.each(lambda tensor: tensor.to(device))

    @property
    def n_bytes(self) -> int:
        """The memory that the statistics take."""
        tensors = (self.mean, self.mean_bias, self.entropy, self.logits, self.correct, self.wrong)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> ReferenceStatistics:
        """The statistics with every tensor changed, in the order of the fields."""
        mean, mean_bias, entropy, logits = (
            None if t is None else change(t) for t in (self.mean, self.mean_bias, self.entropy, self.logits)
        )
        return ReferenceStatistics(
            mean, mean_bias, entropy, logits, change(self.correct), change(self.wrong), self.exclude_answers,
            self.logit_scale, self.softcap,
        )  # fmt: skip


@torch.no_grad()
def reference_statistics(
    hidden: Tensor,
    weight: Tensor,
    correct: Tensor,
    wrong: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    exclude_answers: bool = True,
    kl: KLDirection = "forward",
    keep_logits: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> ReferenceStatistics:
    """What `linear_intervention_loss` needs of the frozen model: μ₀ = Wᵀp₀ and the entropy of p₀, d floats per row.

    p₀ = softmax(z), z = logit_scale·(W·h + b) over V∖{c, w}. With a soft-cap (z = softcap·tanh(z/softcap)), for the
    reverse KL and for a weight that is learned these do not determine the loss, and the logits are kept instead.

    Args:
        hidden: [N, d], the last hidden states of the frozen model, as its head takes them (after the final norm).
        weight: [V, d], the head; of hidden's dtype. One that requires a gradient, as `model.lm_head.weight` does by
            default, makes the result keep [N, V] logits: pass weight.detach() where the head is frozen.
        correct, wrong: int64 [N], the answers' token ids.
        bias: [V] or None.
        softcap: the final logit soft-cap of the model (Gemma 2: 30), or None.
        logit_scale: factor of the logits, before the soft-cap (Cohere: its logit_scale; Granite: 1/logits_scaling).
        exclude_answers: p₀ over V∖{c, w}; False: over all of V.
        kl: the direction that the statistics are for.
        keep_logits: True keeps [N, V] logits, so that a weight or bias can learn; None: where they require a gradient.
        chunk_bytes: extra memory while it runs, beside the result, at most (at least one row of logits). Outside the
            C++ backend the KL of a row to itself is exactly 0 where the loss gets the same rows and chunk_bytes.

    Returns:
        ReferenceStatistics of N rows.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also a token id out of range.
    """
    correct, wrong = check_head(hidden, weight, bias, correct, wrong, softcap, logit_scale, chunk_bytes)
    softcap = None if softcap is None else float(softcap)
    learned = weight.requires_grad or (bias is not None and bias.requires_grad)
    # Copies: the caller may overwrite its ids with the next batch's.
    common = (correct.clone(), wrong.clone(), exclude_answers, float(logit_scale), softcap)
    if softcap is not None or is_reverse(kl) or (learned if keep_logits is None else keep_logits):
        for name, ids in (("correct", correct), ("wrong", wrong)):  # nothing below reads them
            checks.ids_in_range(name, ids, weight.shape[0], "token id")
        logits = logits_in_chunks(hidden, weight, bias, softcap, logit_scale, chunk_bytes)
        return ReferenceStatistics(None, None, None, logits, *common)
    log_sum, mean, mean_bias, _ = linear_softmax(
        unit_stride(hidden), unit_stride(weight), centred(bias), correct, wrong, exclude_answers, float(logit_scale),
        chunk_bytes,
    )  # fmt: skip
    entropy = log_sum - expected_logit(hidden, mean, mean_bias, logit_scale, chunk_bytes)
    return ReferenceStatistics(mean, mean_bias, entropy, None, *common)


def expected_logit(hidden: Tensor, mean: Tensor, mean_bias: Tensor, logit_scale: float, chunk_bytes: int) -> Tensor:
    """Σ p₀·z = s·(h·μ₀ + b·p₀) per row, in float64: the KL is a small difference of it and log-sum-exps."""
    return logit_scale * (inner_products(hidden, mean, chunk_bytes) + mean_bias)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def centred(bias: Tensor | None) -> Tensor | None:
    """b − max b in float32 (float64 stays): no loss sees the difference, and a common offset costs them no digits."""
    if bias is None:
        return None
    bias = bias.detach().to(torch.float64 if bias.dtype == torch.float64 else torch.float32)
    largest = bias.amax()
    return bias - torch.where(largest.isfinite(), largest, 0.0)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correct: Tensor,
    wrong: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The arguments that both functions share; returns the ids as int64."""
    checks.head(hidden, weight, bias, rows="N")
    width = weight.shape[0]
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None:
            checks.positive(name, value)
    check_counts(chunk_bytes=chunk_bytes)
    correct = checks.index_vector("correct", correct, hidden.shape[0], hidden.device)
    wrong = checks.index_vector("wrong", wrong, hidden.shape[0], hidden.device)
    if backends.serving("linear_softmax", hidden) == "reference":
        checks.ids_in_range("correct", correct, width, "token id")
        checks.ids_in_range("wrong", wrong, width, "token id")
    return correct, wrong
