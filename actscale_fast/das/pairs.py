"""Bases and sources on an open, frozen model: logits under an interchange, what stays the same computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..architectures.layout import layout
from ..frozen.batching import forward_arguments
from ..frozen.shortcuts import open_frozen_model
from ..learning.encoded_examples import EncodedExamples
from ..learning.engine import active_region
from ..learning.engine.reference_cache import ReferenceCache, prefix_of
from ..learning.engine.row_store import RowStore
from ..learning.execution import CACHE_BYTES, SPILL_BYTES
from ..modules.evaluation_mode import evaluation_mode
from ..patching.patch import Patch
from .boundless_das import BoundlessDAS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pairs:
    """Logits at the bases' last tokens; a context manager that freezes the model and applies the interchange.

    Args:
        model: plain or compiled.
        data: the bases.
        das: the interchange.
        sources: [N, L, P, H, D], one for each base.
    """

    def __init__(self, model: PreTrainedModel, data: EncodedExamples, das: BoundlessDAS, sources: Tensor) -> None:
        self.model, self.data, self.das, self.sources = model, data, das, sources
        self.found = layout(model, das.location.paths)
        self.region = active_region(das, data)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            arguments = forward_arguments(self.model, self.data.batch([0]))
            self.head, self.section = stack.enter_context(open_frozen_model(self.found, self.model, arguments))
            self.patched = stack.enter_context(Patch(self.model, self.das))
            store = RowStore(len(self.data), CACHE_BYTES, SPILL_BYTES)
            self.constant = ReferenceCache(
                self.model, self.found, self.data, self.region, self.section, self.patched, self.head, store
            )
            self.constant.fill()
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def logits(self, rows: Sequence[int]) -> Tensor:
        """[rows, V] behind the prompts of these rows, under the interchange with their sources."""
        batch = self.data.batch(rows)
        n_columns = batch.input_ids.shape[1]
        width, first = min(self.region.width, n_columns), self.region.first_layer
        kept = self.constant.constants(rows, n_columns)
        prefix = prefix_of(kept, first, self.found.n_layers, batch, width)
        source = self.sources[torch.tensor(rows, device=self.sources.device)]
        with (
            self.das.interchange(source),
            self.patched.prompt(n_columns, batch.attention_mask if batch.padded else None),
        ):
            output, _ = self.section.run(
                forward_arguments(self.model, batch, width), first=first, hidden=kept.get("hidden"), prefix=prefix
            )
        return output if self.head is None else self.head.logits(output)
