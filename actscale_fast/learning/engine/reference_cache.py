"""The frozen model's side of a fit, computed once: what the losses compare with, and what no scalar can change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ...architectures.layout import ModelLayout, embedding_weight
from ...architectures.lm_head import OutputHead
from ...frozen.batching import forward_arguments
from ...frozen.partial_forward import Section, cache_arguments, keys_and_values
from ...patching.patch import AnyPatch
from ..encoded_examples import EncodedExamples
from .extent import Extent, RowStore, right_aligned
from .packing import additive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Prompts in a pass of the frozen model.
REFERENCE_ROWS = 32


class FrozenSide:
    """What the frozen model says of each example, and the part of its computation that stays the same.

    Args:
        model, found: plain or compiled, and its layout.
        data: the examples.
        extent: what an intervention can change of them.
        section: of the model, open.
        patched: the intervention's patch, paused while the frozen model runs.
        head: the model's, or None: logits are kept.
        store: for what is constant.
    """

    def __init__(
        self, model: PreTrainedModel, found: ModelLayout, data: EncodedExamples, extent: Extent, section: Section,
        patched: AnyPatch, head: OutputHead | None, store: RowStore,
    ) -> None:  # fmt: skip
        self.model, self.found, self.data, self.extent = model, found, data, extent
        self.section, self.patched, self.head, self.store = section, patched, head, store
        self.dtype: torch.dtype = embedding_weight(found.model).dtype
        self.statistics: dict[tuple[bool, str], ops.ReferenceStatistics] = {}
        self.outputs: Tensor | None = None  # [N, V] logits where there is no head

    @torch.no_grad()
    def prepare(self, options: Iterable[tuple[bool, str]]) -> Tensor:
        """Run all examples once; the head's inputs [N, d], or their logits [N, V] without one.

        Args:
            options: `exclude_answers` and `kl` of the objectives.
        """
        outputs: list[tuple[list[int], Tensor]] = []
        for rows in self.data.by_length(REFERENCE_ROWS):
            output, kept = self.run(rows)
            outputs.append((rows, output))
            if kept:
                self.store.put(rows, kept)
        order = torch.tensor([row for rows, _ in outputs for row in rows], device="cpu").argsort()
        output = torch.cat([output for _, output in outputs])[order.to(outputs[0][1].device)]
        if self.head is None:
            self.outputs = output
            return output
        correct, wrong = (ids.to(output.device) for ids in (self.data.correct, self.data.wrong))
        for exclude, kl in options:
            self.statistics[exclude, kl] = ops.reference_statistics(
                output, self.head.weight, correct, wrong, exclude_answers=exclude, kl=kl,  # type: ignore[arg-type]
                **self.head.options,
            )  # fmt: skip
        return output

    def reference(self, examples: Tensor, exclude_answers: bool, kl: str) -> ops.ReferenceStatistics | Tensor:
        """What the losses of these examples (int64 [R], on the host) compare with."""
        if self.outputs is not None:
            return self.outputs[examples.to(self.outputs.device)]
        known = self.statistics[exclude_answers, kl]
        return known[examples.to(known.correct.device)]

    def constants(self, rows: Sequence[int], columns: int) -> dict[str, Tensor]:
        """What is constant of these rows, left-padded to `columns`."""
        if self.extent.whole:
            return {}
        n_prefix = max(columns - self.extent.width, 0)
        cut = {}
        for name, value in self._kept(rows).items():
            if name == "hidden":
                cut[name] = value[:, -min(columns, self.extent.width) :]
            elif n_prefix:
                cut[name] = value[:, :, -n_prefix:]
        return cut

    def hidden(self, rows: Sequence[int]) -> Tensor | None:
        """The hidden states [rows, width, d] that the lowest running layer gets, aligned at their last token."""
        return self._kept(rows)["hidden"] if self.extent.first else None

    @torch.no_grad()
    def run(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(the head's inputs or logits of these rows, what is constant of them) without the intervention."""
        from transformers import DynamicCache

        extent = self.extent
        batch = self.data.batch(rows)
        arguments = forward_arguments(self.model, batch)
        cache = DynamicCache() if extent.n_prefix else None
        if cache is not None:
            arguments |= cache_arguments(self.found.model, cache)
        output, noted = self._paused(arguments, wanted=[extent.first] if extent.first else [])
        kept = {}
        if extent.first:
            kept["hidden"] = right_aligned(noted[extent.first], extent.width, 1)
        if cache is not None:
            columns = batch.input_ids.shape[1]
            for index in range(extent.first, self.found.n_layers):
                for name, value in zip(("keys", "values"), keys_and_values(cache, index), strict=True):
                    whole = right_aligned(value[:, :, :columns], extent.longest, 2)
                    kept[f"{name}.{index}"] = whole[:, :, : extent.n_prefix]
        return output, kept

    @torch.no_grad()
    def says_the_same(self, packed: dict[str, Tensor], columns: Sequence[int], expected: Tensor) -> bool:
        """Whether one packed row gives its prompts the head's inputs that they have by themselves, thanks to its mask.

        Args:
            packed: its "ids", "positions" and "mask".
            columns: of the prompts' last tokens.
            expected: [prompts, d].
        """
        arguments = {"input_ids": packed["ids"], "position_ids": packed["positions"], "use_cache": False}
        causal = additive(torch.ones_like(packed["mask"], dtype=torch.bool).tril(), self.dtype)
        off = []
        for mask in (packed["mask"], causal):
            found, _ = self._paused(arguments | {"attention_mask": mask}, every_token=True)
            off.append((found[0, list(columns)] - expected).norm(dim=-1))
        right, wrong = off
        # Half of the digits: another position is far beyond that, rounding far below (some models compute their
        # attention in float32 whatever their dtype). In 16 bits that says little: the mask has to matter as well.
        digits = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
        close = (right <= digits**0.5 * expected.norm(dim=-1)).all()
        return bool(close and right.max() <= 0.1 * wrong.max())

    def _paused(self, arguments: dict[str, Any], **options: Any) -> tuple[Tensor, dict[int, Tensor]]:
        self.patched.paused = True
        try:
            return self.section.run(arguments, **options)
        finally:
            self.patched.paused = False

    def _kept(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.store.get(rows, lambda again: self.run(again)[1])
