"""One pass of a step, from tensors on the device to terms and gradients.

`Passes.compute` reads tensors and their shapes alone and never waits for the device, so that a CUDA graph can capture
it. What depends on values (the rows of a step, their padding, where the constants lie) is decided before, on the host,
and stands in `Inputs`.

Layers below the lowest scalar that is not zero give both directions the same activations. They run once a prompt, and
since an edit of parameters that are 0 is linear in β, their gradient is that of Σ_s s·(upstream under β = s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import ops
from ...architectures.lm_head import OutputHead
from ...frozen.batching import Batch, forward_arguments
from ...frozen.partial_forward import Section
from ...interventions import DynScalar, produced_l1
from ...patching.patch import AnyPatch
from .extent import prefix_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: margin, exclude_answers, kl: rows that share them go through one call of the loss.
LossOptions = tuple[float, bool, str]


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a pass is no tensor; passes of one shape and the same tensor shapes are one graph."""

    width: int  # the last columns that run
    padded: bool
    packed: bool  # several prompts stand in a row
    first: int  # the lowest layer that runs
    regular: bool  # row r is of unit r mod I
    quiet_below: int  # layers below it run once for all directions; n_layers + 1: so does the head
    losses: tuple[LossOptions, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A pass: I units (a prompt, or several packed), B rows (one a unit and direction), R losses, S shares.

    A loss is of a prompt under one direction; R is B but where units are packed. Tensors: "ids" int64 [I, T]; "mask"
    int64 [I, T], packed additive [I, 1, T, T] and then also "positions" [I, T], "row_of", "column_of" int64 [R], where
    each loss's last token is; "expand" int64 [B], the unit of each row; "sign" [B] of ±1; "groups" int64 [I] where the
    intervention is a stack; "hidden" [I, width, d] and "keys.l", "values.l" [I, ·, S, ·] where they are constant;
    "mean" [S, R], 1/n of the share where a loss is its own; "weight" [R], λ_F/n; "sparsity" [R], λ_M/n a direction,
    where produced scalars are penalised (a row is then of one prompt). Of the i-th kind of loss: "places.i" int64,
    which ones, where there are several kinds; "correct.i", "wrong.i", and its reference.
    """

    shape: Shape
    tensors: dict[str, Tensor]
    references: tuple[ops.ReferenceStatistics | Tensor, ...]  # of each loss: statistics, or logits without a head


class Passes:
    """The computation of passes on an open model.

    Args:
        model: plain or compiled.
        section: of the model, open.
        patched: the intervention's patch.
        head: the model's, or None: the losses take logits.
        n_layers: of the model.
        parameters: whose gradients are wanted.
    """

    def __init__(
        self, model: PreTrainedModel, section: Section, patched: AnyPatch, head: OutputHead | None, n_layers: int,
        parameters: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.model, self.section, self.patched, self.head = model, section, patched, head
        self.n_layers, self.parameters = n_layers, list(parameters)

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """The terms of each share [S, 3] and the gradient of each parameter, of E + λ_F·F (+ λ_M·‖produced‖₁)."""
        terms, loss = self.losses(inputs)
        return [terms, *torch.autograd.grad(loss, self.parameters)]

    def losses(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(the terms [S, 3], float32 without a graph; the loss with its graph)."""
        given = inputs.tensors
        (output, produced), direction = self._noted_forward(inputs), given["sign"]
        if inputs.shape.packed:
            output = output[given["row_of"].to(output.device), given["column_of"].to(output.device)]
            direction = direction[given["row_of"]]
        effectiveness, faithfulness = self._row_losses(output, direction.to(output.device), inputs)
        mean, weight = (given[name].to(output.device, effectiveness.dtype) for name in ("mean", "weight"))
        loss = (effectiveness * mean.sum(0)).sum() + (faithfulness * weight).sum()
        produced = torch.zeros_like(effectiveness) if produced is None else produced.to(effectiveness)
        if "sparsity" in given:
            loss = loss + (produced * given["sparsity"].to(produced)).sum()
        rows = torch.stack([effectiveness.detach(), faithfulness.detach(), produced.detach()], -1)  # [R, 3]
        # Not as a product: a row that is not finite concerns its own share alone.
        own = torch.where((mean > 0)[..., None], mean[..., None] * rows, 0.0)  # [S, R, 3]
        return own.sum(1).to(given["mean"].device, torch.float32), loss

    def _noted_forward(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """(`_forward`, ‖produced scalars‖₁ of each row [B] where it is penalised)."""
        probe = self.patched.intervention
        if "sparsity" not in inputs.tensors or not isinstance(probe, DynScalar):
            return self._forward(inputs), None
        with probe.noting() as noted:
            output = self._forward(inputs)
        shape, given = inputs.shape, inputs.tensors
        real = given["mask"][given["expand"]][:, -shape.width :] != 0 if shape.padded else None
        return output, produced_l1(noted, real)

    def _forward(self, inputs: Inputs) -> Tensor:
        """The head's inputs (or logits) of the rows [B, ·], packed at every token [B, T, d]."""
        shape, given = inputs.shape, inputs.tensors
        groups, expand, sign = given.get("groups"), given["expand"], given["sign"]
        first, hidden = shape.first, given.get("hidden")
        if shape.quiet_below > first:
            end = None if shape.quiet_below > self.n_layers else shape.quiet_below
            self.patched.set_rows(1.0, groups)
            shared = self._run(given, shape, given, None, first=first, hidden=hidden, end=end)
            hidden = _SignedRows.apply(shared, expand.to(shared.device), sign.to(shared.device))
            if end is None:
                return hidden
            first = shape.quiet_below
        elif hidden is not None:
            hidden = hidden[expand.to(hidden.device)]
        constant = given
        if not shape.regular:
            kept = {name: value for name, value in given.items() if name.startswith(("keys.", "values."))}
            constant = {name: value[expand.to(value.device)] for name, value in kept.items()}
        self.patched.set_rows(sign, None if groups is None else groups[expand])
        return self._run(given, shape, constant, expand, first=first, hidden=hidden)

    def _run(
        self, given: dict[str, Tensor], shape: Shape, constant: dict[str, Tensor], rows: Tensor | None, *, first: int,
        hidden: Tensor | None, end: int | None = None,
    ) -> Tensor:  # fmt: skip
        """The units, or the rows of them (their numbers int64 [B])."""
        if shape.packed:
            names = {"ids": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
            arguments: dict[str, Any] = {
                argument: given[name] if rows is None else given[name][rows] for name, argument in names.items()
            }
            arguments["use_cache"] = False
            return self.section.run(arguments, first=first, end=end, hidden=hidden, every_token=True)[0]
        batch = Batch(given["ids"], given["mask"], shape.padded)
        batch = batch if rows is None else batch.take(rows)
        n_columns = batch.input_ids.shape[1]
        prefix = prefix_of(constant, first, self.n_layers, batch, shape.width)
        arguments = forward_arguments(self.model, batch, shape.width)
        with self.patched.prompt(n_columns, batch.attention_mask if batch.padded else None):
            return self.section.run(arguments, first=first, end=end, hidden=hidden, prefix=prefix)[0]

    def _row_losses(self, output: Tensor, direction: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Effectiveness and faithfulness of each loss [R]."""
        parts = []
        for number, options in enumerate(inputs.shape.losses):
            places = inputs.tensors.get(f"places.{number}")
            mine = slice(None) if places is None else places.to(output.device)
            parts.append(self._loss(output[mine], direction[mine], inputs, number, options))
        if len(parts) == 1:
            return parts[0]
        every = [inputs.tensors[f"places.{number}"] for number in range(len(parts))]
        order = torch.cat(every).argsort().to(output.device)
        effectiveness, faithfulness = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return effectiveness, faithfulness

    def _loss(
        self, output: Tensor, direction: Tensor, inputs: Inputs, number: int, options: LossOptions
    ) -> tuple[Tensor, Tensor]:
        margin, exclude, kl = options
        correct, wrong = (inputs.tensors[f"{name}.{number}"].to(output.device) for name in ("correct", "wrong"))
        given: dict[str, Any] = {"direction": direction, "margin": margin, "exclude_answers": exclude, "kl": kl}
        reference = inputs.references[number]
        if isinstance(reference, Tensor):
            effectiveness, faithfulness = ops.intervention_loss(output, reference, correct, wrong, **given)
        else:
            assert self.head is not None
            effectiveness, faithfulness = ops.linear_intervention_loss(
                output, self.head.weight, reference, correct, wrong, **given, **self.head.options
            )
        return effectiveness, faithfulness


class _SignedRows(torch.autograd.Function):
    """Rows of prompts that both directions share: row r is x[expand[r]]; the gradient of x[i] is Σ_r sign[r]·dy[r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: Tensor, sign: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(expand, sign)
        ctx.n_items = x.shape[0]
        return x[expand]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        expand, sign = ctx.saved_tensors
        signed = dy * sign.to(dy.dtype).view(-1, *[1] * (dy.dim() - 1))
        return dy.new_zeros(ctx.n_items, *dy.shape[1:]).index_add_(0, expand, signed), None, None
