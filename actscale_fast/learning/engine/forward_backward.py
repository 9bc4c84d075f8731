"""The forward and backward pass of a microbatch, from tensors on the device to terms and gradients.

`ForwardBackward.compute` reads only tensors and their shapes and never waits for the device, so that a CUDA graph can
capture it. Everything that depends on values (the rows of a step, their padding, where constants are kept) is decided
before, on the host, and is part of `MicrobatchInputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ...architectures.lm_head import OutputHead
from ...frozen.batching import Batch, forward_arguments
from ...frozen.partial_forward import PartialForward
from ...interventions import DynScalar, produced_l1
from ...patching.patch import AnyPatch
from ..answer_scores import first_token_divergence, log_probability_differences
from ..objective import LossOptions
from .reference_cache import prefix_of
from .shared_layers import SignedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class MicrobatchShape:
    """The parts of a microbatch that are not tensors; one CUDA graph serves each, if the tensors' shapes agree too."""

    width: int  # number of columns that run, counted from the last
    padded: bool
    packed: bool  # rows hold several prompts
    first_layer: int  # the lowest layer that runs
    regular: bool  # batch row b belongs to packed row b mod I
    shared_below: int  # layers below it run once for all directions; n_layers + 1: so does the head
    losses: tuple[LossOptions, ...]
    answered: bool = False  # prompts run with their answers, which have several tokens
    n_last: int = 1  # the last columns, from the prompts' last token on, whose predictions are read


@dataclass(frozen=True, slots=True)
class MicrobatchInputs:
    """A microbatch as tensors.

    It has I packed rows, B batch rows (one per packed row and direction), R losses (one per prompt and direction, so
    R = B unless prompts are packed) and S fit requests. The tensors are, by name:

    - "ids" int64 [I, T]; "mask" int64 [I, T], or additive [I, 1, T, T] if packed, then with "positions" int64 [I, T];
    - "expand" int64 [B], the packed row of each batch row; "sign" [B], +1 or −1;
    - "groups" int64 [I] if the intervention is a stack;
    - "hidden" [I, width, d], "keys.l" and "values.l" [I, ·, prefix, ·] as far as they are constant;
    - "row_of" and "column_of" int64 [R], the batch row and column of each loss's last token, if packed;
    - "mean" [S, R], 1/n of a request for its own losses, else 0; "weight" [R], λ_F/n; "sparsity" [R], λ_M/(n·d) for d
      directions, if produced scalars are penalised (prompts are not packed then);
    - for the i-th kind of loss "correct.i" and "wrong.i" int64, and "places.i" int64, its losses, if there are several
      kinds.

    If prompts run with their answers, an unpacked prompt has two of the I rows, "row_of" and "column_of" are the places
    of the prompts' last tokens, "correct.i" and "wrong.i" the answers' first tokens, and "answer.*" the tensors of
    `ScoredTokens` for the batch rows; there are no constant hidden states, keys and values.
    """

    shape: MicrobatchShape
    tensors: dict[str, Tensor]
    #: Per kind of loss: statistics; without a head, logits; if prompts run with their answers, the head's inputs.
    references: tuple[ops.ReferenceStatistics | Tensor, ...]


class ForwardBackward:
    """Computes microbatches on an open model.

    Args:
        model: the model, plain or compiled.
        section: the model's open partial forward pass.
        patched: the intervention's patch.
        head: the model's head; None: the losses take logits.
        n_layers: the model's number of layers.
        parameters: the parameters whose gradients are wanted.
    """

    def __init__(
        self, model: PreTrainedModel, section: PartialForward, patched: AnyPatch, head: OutputHead | None,
        n_layers: int, parameters: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.model, self.section, self.patched, self.head = model, section, patched, head
        self.n_layers, self.parameters = n_layers, list(parameters)

    def compute(self, inputs: MicrobatchInputs) -> list[Tensor]:
        """The terms of each request [S, 3] and the gradient of each parameter, of E + λ_F·F (+ λ_M·‖produced‖₁)."""
        terms, loss = self.losses(inputs)
        return [terms, *torch.autograd.grad(loss, self.parameters)]

    def losses(self, inputs: MicrobatchInputs) -> tuple[Tensor, Tensor]:
        """(the terms [S, 3] in float32 and without a graph, the loss with its graph)."""
        given = inputs.tensors
        (output, produced), direction = self._noted_forward(inputs), given["sign"]
        differences = None
        if inputs.shape.answered:
            tokens = {name[7:]: value for name, value in given.items() if name.startswith("answer.")}
            differences = log_probability_differences(output, tokens, len(given["row_of"]), self.head)
        if inputs.shape.packed or inputs.shape.answered:
            output = output[given["row_of"].to(output.device), given["column_of"].to(output.device)]
            direction = direction[given["row_of"]]
        acc = torch.float64 if output.dtype == torch.float64 else torch.float32
        mean, weight = (given[name].to(output.device, acc) for name in ("mean", "weight"))
        effectiveness, faithfulness, weighted = self._row_losses(
            output, direction.to(output.device), inputs, differences, (mean.sum(0), weight)
        )
        loss = weighted.sum()
        produced = torch.zeros_like(effectiveness) if produced is None else produced.to(effectiveness)
        if "sparsity" in given:
            loss = loss + (produced * given["sparsity"].to(produced)).sum()
        rows = torch.stack([effectiveness.detach(), faithfulness.detach(), produced.detach()], -1)  # [R, 3]
        # Not as a product, so that a row that is not finite does not affect other requests.
        own = torch.where((mean > 0)[..., None], mean[..., None] * rows, 0.0)  # [S, R, 3]
        return own.sum(1).to(given["mean"].device, torch.float32), loss

    def _noted_forward(self, inputs: MicrobatchInputs) -> tuple[Tensor, Tensor | None]:
        """(`_forward`, ‖produced scalars‖₁ of each batch row [B] if it is penalised)."""
        probe = self.patched.intervention
        if "sparsity" not in inputs.tensors or not isinstance(probe, DynScalar):
            return self._forward(inputs), None
        with probe.noting() as noted:
            output = self._forward(inputs)
        shape, given = inputs.shape, inputs.tensors
        real = given["mask"][given["expand"]][:, -shape.width :] != 0 if shape.padded else None
        return output, produced_l1(noted, real)

    def _forward(self, inputs: MicrobatchInputs) -> Tensor:
        """The head's inputs (or logits) of the batch rows [B, ·]; of every token [B, T, d] if packed.

        If prompts run with their answers, [B, n_last, ·] unless they are packed.
        """
        shape, given = inputs.shape, inputs.tensors
        groups, expand, sign = given.get("groups"), given["expand"], given["sign"]
        first, hidden = shape.first_layer, given.get("hidden")
        if shape.shared_below > first:
            end = None if shape.shared_below > self.n_layers else shape.shared_below
            self.patched.set_rows(1.0, groups)
            shared = self._run(given, shape, given, None, first=first, hidden=hidden, end=end)
            hidden = SignedRows.apply(shared, expand.to(shared.device), sign.to(shared.device))
            if end is None:
                return hidden
            first = shape.shared_below
        elif hidden is not None:
            hidden = hidden[expand.to(hidden.device)]
        constant = given
        if not shape.regular:
            kept = {name: value for name, value in given.items() if name.startswith(("keys.", "values."))}
            constant = {name: value[expand.to(value.device)] for name, value in kept.items()}
        self.patched.set_rows(sign, None if groups is None else groups[expand])
        return self._run(given, shape, constant, expand, first=first, hidden=hidden)

    def _run(
        self, given: dict[str, Tensor], shape: MicrobatchShape, constant: dict[str, Tensor], rows: Tensor | None, *,
        first: int, hidden: Tensor | None, end: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the packed rows, or the batch rows if `rows` int64 [B] says which packed row each has."""
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
        arguments = forward_arguments(self.model, batch, shape.width, shape.n_last)
        n_prompt = n_columns - (shape.n_last - 1)  # tokens of answers are steered as generated tokens are
        with self.patched.prompt(n_prompt, batch.attention_mask[:, :n_prompt] if batch.padded else None):
            output, _ = self.section.run(
                arguments, first=first, end=end, hidden=hidden, prefix=prefix, every_token=shape.answered
            )
        return output[:, -shape.n_last :] if shape.answered and end is None else output

    def _row_losses(
        self, output: Tensor, direction: Tensor, inputs: MicrobatchInputs, differences: Tensor | None,
        weights: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Effectiveness, faithfulness and their sum with two weights [R] of each loss [R].

        Args:
            differences: of log-probabilities [R], if answered.
        """
        parts = []
        for number, options in enumerate(inputs.shape.losses):
            places = inputs.tensors.get(f"places.{number}")
            mine = slice(None) if places is None else places.to(output.device)
            own = None if differences is None else differences[mine]
            chosen = (weights[0][mine], weights[1][mine])
            parts.append(self._loss(output[mine], direction[mine], inputs, number, options, own, chosen))
        if len(parts) == 1:
            return parts[0]
        every = [inputs.tensors[f"places.{number}"] for number in range(len(parts))]
        order = torch.cat(every).argsort().to(output.device)
        effectiveness, faithfulness, weighted = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return effectiveness, faithfulness, weighted

    def _loss(
        self, output: Tensor, direction: Tensor, inputs: MicrobatchInputs, number: int, options: LossOptions,
        differences: Tensor | None, weights: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        correct, wrong = (inputs.tensors[f"{name}.{number}"].to(output.device) for name in ("correct", "wrong"))
        given: dict[str, Any] = {"direction": direction, "margin": options.margin, **options.kl._asdict()}
        reference = inputs.references[number]
        if differences is not None:
            assert isinstance(reference, Tensor)
            effectiveness = torch.relu(options.margin - direction.to(differences) * differences)
            faithfulness = first_token_divergence(
                output, reference.to(output.device), correct, wrong, **options.kl._asdict(), head=self.head
            )
        elif isinstance(reference, Tensor):  # with the weights in the gradient [R, V], which is then final
            results = ops.intervention_loss(output, reference, correct, wrong, **given, weights=weights)
            return results[0], results[1], results[2]
        else:
            assert self.head is not None
            effectiveness, faithfulness = self.head.intervention_loss(output, reference, correct, wrong, **given)
        return effectiveness, faithfulness, weights[0] * effectiveness + weights[1] * faithfulness
