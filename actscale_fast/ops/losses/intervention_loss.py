"""The losses of an intervention, from logits: hinge on the two answers, KL over the other tokens, ℓ1 of the scalars.

The gradient of the logits is computed in the forward pass, where both rows are at hand. With q = softmax(z) and
p = softmax(r) over V∖{c, w}: dKL(p‖q)/dz = q − p, dKL(q‖p)/dz = q·(log q − log p − KL), and the hinge adds ∓s at
the two answers. Each row is then scaled by its upstream gradient, which is exact for every reduction. Where weights are
given to the forward pass, it writes the gradient of w_E·E + w_F·F, and an upstream of 1 takes no second pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends, checks, outputs, reference
from ..interface import LossArguments
from ..once_differentiable import once_differentiable
from ..registry import LIBRARY, define, pinned, run
from ..torch_internals import below_autograd, graph_is_kept, is_eager

KLDirection = Literal["forward", "reverse"]


def _empty_results(call: LossArguments) -> tuple[Tensor, ...]:
    return outputs.intervention_loss(call.logits, call.scalars, call.need_grad)


_loss_op = define(
    "intervention_loss(Tensor logits, Tensor reference_logits, Tensor? correct, Tensor? wrong, Tensor? direction,"
    " Tensor? scalars, float margin, float inverse_temperature, bool exclude_answers, bool reverse, bool need_grad,"
    " Tensor? row_weight, float? softcap, Tensor? gradient_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: _empty_results(LossArguments(*arguments)),
)
_scale_op_ = define(
    "intervention_loss_scale_(Tensor(a!) grad, Tensor d_effectiveness, Tensor d_faithfulness, Tensor? correct,"
    " Tensor? wrong, Tensor answer_grad) -> ()"
)


def intervention_loss(
    logits: Tensor,
    reference_logits: Tensor,
    correct: Tensor,
    wrong: Tensor,
    *,
    direction: Tensor,
    margin: float = 1.0,
    exclude_answers: bool = True,
    kl: KLDirection = "forward",
    scalars: Tensor | None = None,
    inplace_gradient: bool = False,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Effectiveness and faithfulness of each row, and on request the ℓ1 norm of the scalars, with all gradients.

    effectiveness = max(0, margin − s·(z[c] − z[w])) and faithfulness = KL(p₀ ‖ p_s) over V∖{c, w}, both renormalised.
    The three terms are those of arXiv 2410.04962; hinge, KL direction and exclusion are this package's reading of it.

    Args:
        logits: [N, V], next-token logits z under the intervention; any row stride.
        reference_logits: [N, V], the frozen model's logits; constant (no gradient).
        correct, wrong: int64 [N], the token ids c and w; different in each row.
        direction: [N] of ±1, the sign s of the strength each row was run with.
        margin: m, in logits.
        exclude_answers: leave c and w out of the KL and renormalise; False: all of V.
        kl: "forward" KL(p₀ ‖ p_s) or "reverse" KL(p_s ‖ p₀), in nats.
        scalars: the learned scalars, any shape; adds a third result.
        inplace_gradient: let the gradient overwrite the logits, which saves an [N, V] tensor. They must be contiguous,
            no leaf, and not be used again: their version is raised, so that a graph that has saved them says so in its
            backward. No effect without a gradient, on the reference backend and in traces (a compiler plans its own
            memory).
        weights: (w_E [N], w_F [N]), for example 1/N and λ_F/N; not differentiated. They add a result, the loss
            w_E·effectiveness + w_F·faithfulness of each row, and the other two then have no gradient. Where the
            weights are known beforehand this is the fastest form: as long as the loss is only summed up, its gradient
            is finished in the forward pass. The gradient holds the weights in the logits' dtype, so scale the loss of
            float16 logits by factors in the weights and not afterwards.

    Returns:
        (effectiveness [N], faithfulness [N]), then the weighted loss [N] if there are weights, then ‖scalars‖₁ [] if
        there are scalars, all float32. The gradient of the ℓ1 norm is sign(scalars), 0 at 0.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also a token id out of range, equal answers
            and a direction other than ±1 (on a GPU, where nothing synchronises, an id out of range makes its row NaN).

    Once differentiable; torch.func transforms are not supported.
    """
    check_logits(logits, reference_logits)
    n_rows = logits.shape[0]
    correct = checks.index_vector("correct", correct, n_rows, logits.device)
    wrong = checks.index_vector("wrong", wrong, n_rows, logits.device)
    direction = checks.row_values("direction", direction, n_rows, logits.device)
    if scalars is not None:
        checks.same_device("scalars", checks.floating_tensor("scalars", scalars, "of any shape"), logits.device)
    if inplace_gradient:
        check_overwritable(logits, reference_logits)
    factors = None if weights is None else _checked_weights(weights, n_rows, logits.device)
    margin, reverse = checks.number("margin", margin), is_reverse(kl)
    losses: Sequence[Tensor]
    if backends.serving("intervention_loss", logits) == "reference":
        check_answers(correct, wrong, direction, logits.shape[1])
        losses = reference.intervention_loss(
            logits, reference_logits, correct, wrong, direction,
            margin=margin, exclude_answers=exclude_answers, reverse=reverse,
        )  # fmt: skip
        l1 = None if scalars is None else reference.l1_norm(scalars)
        total = None if factors is None else (factors * torch.stack(losses, -1)).sum(-1)
    else:
        factors = None if factors is None else factors.to(torch.float32)
        scalars = None if scalars is None else scalars.to(torch.float32).contiguous()
        *losses, l1 = fused_losses(
            logits, reference_logits, correct=correct, wrong=wrong, direction=direction.to(torch.float32),
            scalars=scalars, margin=margin, exclude_answers=exclude_answers, reverse=reverse, gradient_weight=factors,
            in_place=inplace_gradient,
        )  # fmt: skip
        total = None if factors is None else _WeightedSum.apply(*losses, factors)
    if total is not None:
        losses = [*(loss.detach() for loss in losses), total]
    return tuple(losses) if l1 is None or scalars is None else (*losses, l1)


def _checked_weights(weights: object, n_rows: int, device: torch.device) -> Tensor:
    """[N, 2]."""
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        raise TypeError(f"weights: got {type(weights).__name__}, expected two tensors [{n_rows}]")
    return torch.stack([checks.row_values(f"weights[{i}]", one, n_rows, device) for i, one in enumerate(weights)], -1)


class _WeightedSum(torch.autograd.Function):
    """w_E·E + w_F·F of losses that have the weights in their gradients already."""

    @staticmethod
    def forward(ctx: Any, effectiveness, faithfulness, weights):  # type: ignore[no-untyped-def]
        return weights[:, 0] * effectiveness + weights[:, 1] * faithfulness

    @staticmethod
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        return upstream, upstream, None


def check_logits(logits: Tensor, reference_logits: Tensor) -> None:
    checks.floating_tensor("logits", logits, "[N, V]")
    checks.floating_tensor("reference_logits", reference_logits, "[N, V]")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [N, V]")
    if reference_logits.shape != logits.shape:
        raise ValueError(f"reference_logits: got shape {tuple(reference_logits.shape)}, expected {tuple(logits.shape)}")
    if reference_logits.dtype != logits.dtype:
        raise TypeError(f"reference_logits: got dtype {reference_logits.dtype}, expected {logits.dtype} as logits have")
    checks.same_device("reference_logits", reference_logits, logits.device)
    if reference_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("reference_logits: requires a gradient, but the reference is a constant; detach it")


def check_overwritable(logits: Tensor, reference_logits: Tensor) -> None:
    if not is_eager(logits, reference_logits):  # nothing is overwritten there, and a trace has no memory yet
        return
    if not logits.is_contiguous():
        raise ValueError(f"inplace_gradient: got logits of strides {logits.stride()}, expected contiguous ones")
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_gradient: got logits that are a leaf, whose values the gradient would overwrite; expected the"
            " result of an operation"
        )
    (begin, end), (reference_begin, reference_end) = _extent(logits), _extent(reference_logits)
    if begin < reference_end and reference_begin < end:
        raise ValueError(
            "inplace_gradient: got logits that share memory with reference_logits, expected memory of their own"
        )


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of `x` to after its last one."""
    begin = x.data_ptr()
    if x.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()


def is_reverse(kl: str) -> bool:
    if kl not in ("forward", "reverse"):
        raise ValueError(f"kl: got {kl!r}, expected 'forward' or 'reverse'")
    return kl == "reverse"


def check_answers(correct: Tensor, wrong: Tensor, direction: Tensor, width: int) -> None:
    """The checks that the C++ kernels make themselves, for the others. Only CPU tensors outside of traces are read."""
    if correct.device.type != "cpu" or not is_eager(correct, wrong, direction):
        return
    checks.ids_in_range("correct", correct, width, "token id")
    checks.ids_in_range("wrong", wrong, width, "token id")
    for row in (correct == wrong).nonzero().flatten().tolist():
        raise ValueError(f"wrong: row {row} has token id {int(wrong[row])}, the same as correct")
    for row in (direction.abs() != 1).nonzero().flatten().tolist():
        raise ValueError(f"direction: row {row} is {float(direction[row])}, expected 1 or -1")


def fused_losses(
    logits: Tensor, reference_logits: Tensor, *, in_place: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused op: (effectiveness, faithfulness, l1). `arguments`: the other fields of `LossArguments`."""
    if logits.shape[1] > 1:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        reference_logits = reference_logits if reference_logits.stride(1) == 1 else reference_logits.contiguous()
    scalars = arguments.get("scalars")
    learned = logits.requires_grad or (scalars is not None and scalars.requires_grad)
    need_grad = learned and torch.is_grad_enabled()
    call = LossArguments(logits, reference_logits, need_grad=need_grad, **arguments)
    if in_place and logits.requires_grad and need_grad and _all_eager(*call):
        results = _InterventionLoss.apply(True, *call)
        torch.autograd.graph.increment_version(logits)
    else:
        results = _loss_op(*call)
    return results[0], results[1], results[4]


def computed_in_place(call: LossArguments) -> tuple[Tensor, ...]:
    """The op's six results without autograd; a gradient may overwrite the logits, except in a trace."""
    if call.need_grad and _all_eager(*call):
        return run("intervention_loss", *call, in_place=True)
    return _loss_op(*call)  # type: ignore[no-any-return]


def _all_eager(*arguments: Any) -> bool:
    return is_eager(*(argument for argument in arguments if isinstance(argument, Tensor)))


#: Where `_InterventionLoss.apply`, whose first argument is `in_place`, takes the tensors that have gradients.
_LOGITS, _SCALARS = (1 + LossArguments._fields.index(name) for name in ("logits", "scalars"))


class _InterventionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_place: bool, *arguments: Any):  # type: ignore[no-untyped-def]
        call = LossArguments(*arguments)
        if in_place:
            results = run("intervention_loss", *call, in_place=True)
        else:
            with below_autograd():
                results = _loss_op(*call)
        effectiveness, faithfulness, grad, answer_grad, l1, sign = results
        if in_place:  # the gradient is the logits: nothing that autograd should see as a result
            results = (effectiveness, faithfulness, grad.new_empty(0), answer_grad, l1, sign)
        ctx.mark_non_differentiable(results[2], answer_grad, sign)
        ctx.set_materialize_grads(False)  # or autograd would fill an [N, V] of zeros for the gradient's own gradient
        # Neither the logits nor the reference outlive the forward pass: the gradient is all that the backward needs.
        ctx.grad, ctx.answer_grad, ctx.sign = grad, answer_grad, sign
        ctx.backend = backends.serving("intervention_loss", call.logits)
        # Not the weights themselves, which the caller may overwrite.
        ctx.ignored = None if call.row_weight is None else call.row_weight == 0
        ctx.save_for_backward(
            call.correct, call.wrong
        )  # the caller's own: a change in place before the backward raises
        return results

    @staticmethod
    @once_differentiable("intervention_loss, kl_div_from_logits")
    def backward(ctx: Any, d_effectiveness, d_faithfulness, _grad, _answer_grad, d_l1, _sign):  # type: ignore[no-untyped-def]
        gradients: list[Tensor | None] = [None] * (1 + len(LossArguments._fields))
        upstream = [d for d in (d_effectiveness, d_faithfulness) if d is not None]
        if ctx.needs_input_grad[_LOGITS] and upstream:
            if ctx.grad is None:
                raise RuntimeError("intervention_loss: a second backward needs retain_graph=True in the first one")
            answers = ctx.saved_tensors
            if graph_is_kept(upstream[0]):
                d_logits = ctx.grad.clone()
            else:
                d_logits, ctx.grad = ctx.grad, None
            zero = upstream[0].new_zeros(()).expand(d_logits.shape[0])
            d_effectiveness = zero if d_effectiveness is None else d_effectiveness
            d_faithfulness = zero if d_faithfulness is None else d_faithfulness
            if ctx.ignored is not None:  # their zeros, which an upstream of inf or NaN would make NaN
                d_faithfulness = d_faithfulness.masked_fill(ctx.ignored, 1.0)
            with pinned(ctx.backend):
                _scale_op_(d_logits, d_effectiveness, d_faithfulness, *answers, ctx.answer_grad)
            gradients[_LOGITS] = d_logits
        if ctx.needs_input_grad[_SCALARS] and d_l1 is not None:
            gradients[_SCALARS] = d_l1 * ctx.sign
        return tuple(gradients)


LIBRARY.impl("intervention_loss", lambda *arguments: _InterventionLoss.apply(False, *arguments), "Autograd")
