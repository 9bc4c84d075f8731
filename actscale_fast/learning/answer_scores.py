"""What the losses of answers of several tokens read from a model's output: log-probabilities, and a KL divergence.

The output is the head's inputs, or logits if the head is not known. From the head's inputs, logits are made for some
rows at a time and their gradient is taken in the forward pass, so that no more than `CHUNK_BYTES` of them exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures.lm_head import OutputHead
from ..ops.losses.linear_softmax import CHUNK_BYTES
from ..ops.once_differentiable import once_differentiable
from ..ops.reference import accumulation_dtype, kl_divergence, without_columns

if TYPE_CHECKING:
    from .encoded_examples import EncodedExamples


def log_probability_differences(
    output: Tensor, tokens: dict[str, Tensor], n_losses: int, head: OutputHead | None
) -> Tensor:
    """log p(correct) − log p(wrong) of each loss [n_losses], in fp32 or wider; see `long_answers`.

    Args:
        output: the head's inputs [B, T, d], or the logits [B, T, V].
        tokens: from `ScoredTokens.tensors`.
        n_losses: number of losses.
        head: the head; None: the output is logits.
    """
    given = {name: value.to(output.device) for name, value in tokens.items()}
    states, loss, later = output[given["row"], given["column"]], given["loss"], given["later"]
    logits = chosen_logits(states, given["id"][:, None], head)[:, 0]
    sign = given["sign"].to(logits)
    found = logits.new_zeros(n_losses).index_add(0, loss, sign * logits)
    return found.index_add(0, loss[later], -sign[later] * log_normalisers(states[later], head))


def answer_log_probabilities(
    output: Tensor, data: EncodedExamples, rows: Sequence[int], head: OutputHead | None
) -> Tensor:
    """log p(correct) and log p(wrong) of each example [B, 2], in fp32 or wider and with gradient.

    Args:
        output: where both answers are one token, the head's inputs [B, d], or the logits [B, V], at the prompts' last
            tokens. Otherwise [2·B, T, ·], first with the correct answers and then with the wrong ones, from the
            prompts' last tokens on.
        data: the examples.
        rows: numbers of examples of one kind (see `EncodedExamples.kind`).
        head: the head; None: the output is logits.
    """
    if rows[0] not in data.long_answers:
        ids = torch.stack([data.correct[list(rows)], data.wrong[list(rows)]], -1)  # [B, 2]
        chosen = chosen_logits(output, ids, head)
        return chosen - log_normalisers(output, head)[:, None].to(chosen)
    both = [data.long_answers[row] for row in rows]
    answers = [one.correct for one in both] + [one.wrong for one in both]
    tokens = [(of, t, token) for of, answer in enumerate(answers) for t, token in enumerate(answer)]
    of, column, ids = torch.tensor(tokens, dtype=torch.int64, device=output.device).unbind(1)
    states = output[of, column]
    values = chosen_logits(states, ids[:, None], head)[:, 0]
    values = values - log_normalisers(states, head).to(values)
    return values.new_zeros(2 * len(rows)).index_add(0, of, values).view(2, -1).T


def chosen_logits(states: Tensor, ids: Tensor, head: OutputHead | None) -> Tensor:
    """The logits of some tokens [K, J], in fp32 or wider, from ids [K, J] and states [K, d] or logits [K, V]."""
    if head is None:
        return states.gather(-1, ids.to(states.device)).to(accumulation_dtype(states.dtype))
    return head.chosen(states, ids)


def log_normalisers(states: Tensor, head: OutputHead | None) -> Tensor:
    """log Σ exp(z) over the vocabulary [K]."""
    return _row_by_row(lambda logits, _: logits.logsumexp(-1), states, head)


def first_token_divergence(
    states: Tensor, frozen: Tensor, correct: Tensor, wrong: Tensor, *, exclude_answers: bool, kl: str,
    head: OutputHead | None,
) -> Tensor:  # fmt: skip
    """The KL divergence from the frozen model's next token after each prompt [R].

    Args:
        states: at the prompts' last tokens, [R, d] or logits [R, V].
        frozen: those of the frozen model.
        correct, wrong: int64 [R], the first tokens of the answers, which may be the same one.
        exclude_answers: leave them out and renormalise.
        kl: "forward" or "reverse".
        head: the head; None: states are logits.
    """
    answers = torch.stack([correct, wrong], -1)

    def divergence(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            reference = _logits(frozen[rows], head)
        if exclude_answers:
            logits, reference = (without_columns(z, answers[rows]) for z in (logits, reference))
        return kl_divergence(logits, reference, reverse=kl == "reverse")

    return _row_by_row(divergence, states, head)


def _row_by_row(of_logits: Callable[[Tensor, slice], Tensor], states: Tensor, head: OutputHead | None) -> Tensor:
    """A number for each row from its logits [K]; `of_logits` gets the logits of some rows, and these rows."""
    if head is None:
        return of_logits(_logits(states, None), slice(None))
    needs_gradient = states.requires_grad and torch.is_grad_enabled()
    return _RowByRow.apply(states, head, of_logits, needs_gradient)  # type: ignore[no-any-return]


def _logits(states: Tensor, head: OutputHead | None) -> Tensor:
    """[K, V] in fp32 or wider."""
    logits = states if head is None else head.logits(states)
    return logits.to(accumulation_dtype(logits.dtype))


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, head: OutputHead, of_logits: Callable[[Tensor, slice], Tensor], needs_gradient: bool
    ) -> Tensor:
        values, slopes = [], []
        for rows in head.chunks(states, CHUNK_BYTES):
            own = states[rows].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                value = of_logits(_logits(own, head), rows)
            values.append(value.detach())
            if needs_gradient:
                slopes.append(torch.autograd.grad(value, own, torch.ones_like(value))[0])
        if needs_gradient:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    @once_differentiable("the losses of answers of several tokens")
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None, None
