"""The functions that every backend provides: `ops/cpu` (C++), `ops/cuda`, `ops/triton`, or one of your own.

The functions take plain tensors, allocate their outputs and know nothing of autograd. Outputs that are not asked for
are empty tensors: the number of outputs never changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class LossArguments(NamedTuple):
    """The arguments of `intervention_loss` below the public functions, in the order of the op's schema."""

    logits: Tensor  # [N, V], unit stride over V, any row stride
    reference_logits: Tensor
    correct: Tensor | None = None  # [N] int64 contiguous; None: no answers
    wrong: Tensor | None = None
    direction: Tensor | None = None  # [N] float32 of ±1, contiguous
    scalars: Tensor | None = None  # float32 contiguous, any shape
    margin: float = 0.0
    inverse_temperature: float = 1.0
    exclude_answers: bool = False
    reverse: bool = False
    need_grad: bool = False
    row_weight: Tensor | None = None  # [N] float32 contiguous; without answers
    softcap: float | None = None  # of both sides' logits, before the temperature; without answers
    gradient_weight: Tensor | None = None  # [N, 2] float32 contiguous: w_E, w_F in the gradient alone; with answers


class BackendModule(Protocol):
    """The functions of a backend's module."""

    def scale_heads(
        self,
        x: Tensor,  # [B, T, H, D], any strides over B, T, H; unit stride over D
        alpha: Tensor | None,  # [G, P, H] float32 contiguous, P in {1, T}
        shift: Tensor | None,  # [G, P, H, D] float32 contiguous
        strength: float,
        row_strength: Tensor | None,  # [B] float32 contiguous; β of row b = strength · row_strength[b]
        group: Tensor | None,  # [B] int64 contiguous; None: G == 1
    ) -> Tensor:
        """y, laid out as `outputs.like(x)`; one rounding from float32. ValueError where D is strided."""

    def scale_heads_backward(
        self,
        dy: Tensor,  # [B, T, H, D], any strides, stride 0 included
        x: Tensor,  # read for dalpha alone, else only what dx is laid out like: any strides
        alpha: Tensor | None,
        shift: Tensor | None,
        strength: float,
        row_strength: Tensor | None,
        group: Tensor | None,
        need_dx: bool,
        need_dalpha: bool,
        need_dshift: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx laid out as `outputs.like(x)`, dalpha [G, P, H] float32, dshift [G, P, H, D] float32).

        Sums in a fixed order.
        """

    def dynamic_scale(
        self,
        x: Tensor,  # [B, T, H, D], any strides over B, T, H; unit stride over D
        weight: Tensor,  # [G, H, D] float32 contiguous
        bias: Tensor | None,  # [G, H] float32 contiguous
        strength: float,
        row_strength: Tensor | None,  # [B] float32 contiguous; β of row b = strength · row_strength[b]
        group: Tensor | None,  # [B] int64 contiguous; None: G == 1
    ) -> tuple[Tensor, Tensor]:
        """(y laid out as `outputs.like(x)`, α = ⟨weight, x⟩ + bias [B, T, H] float32 contiguous)."""

    def dynamic_scale_backward(
        self,
        dy: Tensor,  # [B, T, H, D], any strides, stride 0 included
        d_scalars: Tensor | None,  # [B, T, H] float32, any strides: the upstream of α
        x: Tensor,  # as in the forward
        weight: Tensor,
        scalars: Tensor,  # α as the forward returned it
        strength: float,
        row_strength: Tensor | None,
        group: Tensor | None,
        need_dx: bool,
        need_dweight: bool,
        need_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx laid out as `outputs.like(x)`, dweight [G, H, D] float32, dbias [G, H] float32).

        Sums in a fixed order.
        """

    def scale_channels(
        self,
        x: Tensor,  # [..., d] contiguous, or [N, d] with any stride over N and unit stride over d
        weight: Tensor,  # [d] float32 contiguous
    ) -> Tensor:
        """y = x·weight of x's shape, contiguous; one rounding from float32. ValueError for another layout of x."""

    def scale_channels_backward(
        self,
        dy: Tensor,  # of x's shape and dtype, any strides, stride 0 included
        x: Tensor,  # as in the forward
        weight: Tensor,
        need_dx: bool,
        need_dweight: bool,
    ) -> tuple[Tensor, Tensor]:
        """(dx of x's shape, contiguous, dweight [d] float32). Sums in a fixed order."""

    def intervention_loss(
        self,
        *arguments: Any,  # the fields of LossArguments, in their order
        in_place: bool = False,  # with need_grad; logits are contiguous then
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(effectiveness [N], faithfulness [N], grad [N, V], answer_grad [N, 3], l1 [], sign like scalars).

        grad: d(effectiveness + faithfulness)/dlogits in the logits' dtype, contiguous, the two answer columns summed in
        float32 before rounding. answer_grad: d faithfulness/dz[c], d faithfulness/dz[w], d effectiveness/dz[c] in
        float32 (d effectiveness/dz[w] is minus the last). All but the logits' gradient are float32. With in_place grad
        overwrites the logits. With row_weight both faithfulness and grad are multiplied by the row's; where it is 0,
        neither row is read and both are 0. With gradient_weight, grad and answer_grad are those of
        w_E·effectiveness + w_F·faithfulness, and the two losses stay as they are.
        """

    def intervention_loss_scale_(
        self,
        grad: Tensor,
        d_effectiveness: Tensor,  # [N] float32, any stride
        d_faithfulness: Tensor,
        correct: Tensor | None,
        wrong: Tensor | None,
        answer_grad: Tensor,
    ) -> None:
        """Turns `grad` of upstream 1 into that of the given upstream, in place.

        Rows whose d_faithfulness is 1 are not passed over again: only their two answer columns are rewritten.
        """

    def proximal_adam_(
        self,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        l1: float,
    ) -> None:
        """See `reference.proximal_adam_`; all float32 contiguous."""

    def linear_softmax(
        self,
        hidden: Tensor,  # [N, d], unit stride over d
        weight: Tensor,  # [V, d], of hidden's dtype, unit stride over d
        bias: Tensor | None,  # [V] float32 contiguous
        correct: Tensor | None,  # [N] int64 contiguous; None: no answers, every column is kept
        wrong: Tensor | None,
        exclude_answers: bool,
        logit_scale: float,
        chunk_bytes: int,  # extra memory, at most (at least one row of logits)
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log_sum [N] float64, mean [N, d] float32, mean_bias [N] float64, answers [N, 2] float32).

        Of q = softmax(z), z = logit_scale·(W·h + bias), over the kept columns: log Σ exp(z), Wᵀq, q·bias, and z at the
        two answers. Products are not rounded below float32.
        """
