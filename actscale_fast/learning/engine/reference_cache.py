"""What the frozen model computes for each example, once: the references of the losses, and what stays constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ...architectures.hugging_face import embedding_weight
from ...architectures.layout import ModelLayout
from ...architectures.lm_head import OutputHead
from ...frozen.batching import Batch, forward_arguments
from ...frozen.partial_forward import PartialForward, Prefix, cache_arguments, keys_and_values
from ...patching.patch import AnyPatch
from ..encoded_examples import EncodedExamples
from ..objective import KLOptions
from .active_region import ActiveRegion
from .row_store import RowStore, right_aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Number of prompts in one pass of the frozen model.
REFERENCE_ROWS = 32


class ReferenceCache:
    """The frozen model's predictions for each example, and the part of its computation that no step changes.

    Args:
        model, found: the model, plain or compiled, and its layout.
        data: the examples.
        region: what an intervention can change.
        section: the model's open partial forward pass.
        patched: the intervention's patch, which is paused while the frozen model runs.
        head: the model's head; None: logits are kept.
        store: holds what is constant.
    """

    def __init__(
        self, model: PreTrainedModel, found: ModelLayout, data: EncodedExamples, region: ActiveRegion,
        section: PartialForward, patched: AnyPatch, head: OutputHead | None, store: RowStore,
    ) -> None:  # fmt: skip
        self.model, self.found, self.data, self.region = model, found, data, region
        self.section, self.patched, self.head, self.store = section, patched, head, store
        self.dtype: torch.dtype = embedding_weight(found.model).dtype
        self.statistics: dict[KLOptions, ops.ReferenceStatistics] = {}
        self.logits: Tensor | None = None  # [N, V] if there is no head
        self.output: Tensor | None = None  # what `fill` returned, if some answers have several tokens

    @torch.no_grad()
    def fill(self, options: Iterable[KLOptions]) -> Tensor:
        """Run all examples once; returns the head's inputs [N, d], or the logits [N, V] if there is no head.

        Args:
            options: how the objectives take the KL, each once.
        """
        outputs: list[tuple[list[int], Tensor]] = []
        for rows in self.data.by_length(REFERENCE_ROWS):
            output, constant = self._run(rows)
            outputs.append((rows, output))
            kept = [place for place, row in enumerate(rows) if row not in self.data.long_answers]
            if constant and kept:  # prompts that run with their answers run whole
                some = constant if len(kept) == len(rows) else {name: value[kept] for name, value in constant.items()}
                self.store.put([rows[place] for place in kept], some)
        order = torch.tensor([row for rows, _ in outputs for row in rows], device="cpu").argsort()
        output = torch.cat([output for _, output in outputs])[order.to(outputs[0][1].device)]
        if self.data.long_answers:
            self.output = output
        if self.head is None:
            self.logits = output
            return output
        correct, wrong = (ids.to(output.device) for ids in (self.data.correct, self.data.wrong))
        for option in options:
            self.statistics[option] = self.head.reference_statistics(output, correct, wrong, **option._asdict())
        return output

    def reference(self, examples: Tensor, option: KLOptions) -> ops.ReferenceStatistics | Tensor:
        """The references of the losses of these examples (int64 [R], on the host)."""
        if self.logits is not None:
            return self.logits[examples.to(self.logits.device)]
        known = self.statistics[option]
        return known[examples.to(known.correct.device)]

    def frozen_output(self, examples: Tensor) -> Tensor:
        """The frozen model's head inputs [R, d] (or logits) after these prompts (int64 [R], on the host)."""
        assert self.output is not None
        return self.output[examples.to(self.output.device)]

    def constants(self, rows: Sequence[int], columns: int) -> dict[str, Tensor]:
        """What is constant for these rows, left-padded to `columns`: "hidden", "keys.l" and "values.l"."""
        if self.region.is_whole:
            return {}
        n_prefix = max(columns - self.region.width, 0)
        cut = {}
        for name, value in self._stored(rows).items():
            if name == "hidden":
                cut[name] = value[:, -min(columns, self.region.width) :]
            elif n_prefix:
                cut[name] = value[:, :, -n_prefix:]
        return cut

    def hidden(self, rows: Sequence[int]) -> Tensor | None:
        """The hidden states [rows, width, d] that enter the lowest running layer, aligned at their last token."""
        return self._stored(rows)["hidden"] if self.region.first_layer else None

    @torch.no_grad()
    def run_frozen(self, arguments: dict[str, Any], **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """The section's output without the intervention."""
        self.patched.paused = True
        try:
            return self.section.run(arguments, **options)
        finally:
            self.patched.paused = False

    @torch.no_grad()
    def _run(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the head's inputs or logits of these rows, what is constant for them)."""
        from transformers import DynamicCache

        region = self.region
        batch = self.data.batch(rows)
        arguments = forward_arguments(self.model, batch)
        cache = DynamicCache() if region.n_prefix else None
        if cache is not None:
            arguments |= cache_arguments(self.found.model, cache)
        first = region.first_layer
        output, noted = self.run_frozen(arguments, wanted=[first] if first else [])
        constant = {}
        if first:
            constant["hidden"] = right_aligned(noted[first], region.width, 1)
        if cache is not None:
            columns = batch.input_ids.shape[1]
            for index in range(first, self.found.n_layers):
                for name, value in zip(("keys", "values"), keys_and_values(cache, index), strict=True):
                    whole = right_aligned(value[:, :, :columns], region.longest, 2)
                    constant[f"{name}.{index}"] = whole[:, :, : region.n_prefix]
        return output, constant

    def _stored(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.store.get(rows, lambda missing: self._run(missing)[1])


def prefix_of(constant: dict[str, Tensor], first: int, n_layers: int, batch: Batch, width: int) -> Prefix | None:
    """The keys and values of a batch's columns before the last `width`, for the layers from `first` on.

    Args:
        constant: "keys.l" and "values.l" of these layers; not needed if all columns run, where the result is None.
        first, n_layers: the lowest layer that runs, and the model's number of layers.
        batch: the whole batch.
        width: number of columns that run.
    """
    n_prefix = batch.input_ids.shape[1] - width
    if n_prefix <= 0:
        return None
    layers = [(constant[f"keys.{index}"], constant[f"values.{index}"]) for index in range(first, n_layers)]
    return Prefix(first, layers, len(batch), n_prefix, batch.input_ids.device)
