"""What an intervention cannot change, computed once for all examples and kept: the frozen model's side of a step.

Layers below the lowest steered one give the same hidden states in every step, tokens before the first steered one the
same keys and values, and the frozen model the same distributions. The first two are kept row by row: on the model's
device up to `cache_bytes`, then in CPU memory up to `spill_bytes`; rows beyond both are computed again when they are
asked for. All tensors are aligned at their last column, as left-padded batches are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...frozen.batching import Batch
from ...frozen.partial_forward import Prefix
from ...interventions import Intervention
from ..encoded_examples import EncodedExamples

#: Default budgets in bytes.
CACHE_BYTES, SPILL_BYTES = 2 << 30, 8 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """The part of the computation that an intervention can change."""

    first: int  # the lowest layer that runs; the output of the layer below is constant
    width: int  # the last columns that run
    longest: int  # tokens of the longest prompt

    @property
    def n_prefix(self) -> int:
        """Columns before those that run."""
        return self.longest - self.width

    @property
    def whole(self) -> bool:
        """Whether everything runs and nothing is kept."""
        return self.first == 0 and self.n_prefix == 0


def extent_of(intervention: Intervention, data: EncodedExamples) -> Extent:
    """The part of the computation that the intervention can change on these examples."""
    places = [single.location for single in intervention.singles]
    longest = max(map(len, data.prompts))
    first = min(place.first_changed(min(place.layers)) for place in places)
    positions: list[int] = []
    for place in places:
        if place.positions is None:
            return Extent(first, longest, longest)
        positions += place.positions
    return Extent(first, max(_reach(len(prompt), positions) for prompt in data.prompts), longest)


def _reach(length: int, positions: Sequence[int]) -> int:
    """Tokens from the first steered one to the last of a prompt; 1 where none is steered."""
    from_end = [length - position if position >= 0 else -position for position in positions]
    return max((tokens for tokens in from_end if 0 < tokens <= length), default=1)


class RowStore:
    """Named tensors [N, ...] that belong to rows, within two budgets of memory.

    Args:
        n_rows: N.
        cache_bytes: on the device that the tensors come from.
        spill_bytes: in CPU memory, for rows that did not fit; nothing where they come from there.
    """

    def __init__(self, n_rows: int, cache_bytes: int, spill_bytes: int) -> None:
        self.n_rows, self.budgets = n_rows, (cache_bytes, spill_bytes)
        self.near: dict[str, Tensor] = {}  # rows 0 … n_near − 1
        self.far: dict[str, Tensor] = {}  # the n_far rows after them
        self.n_near = self.n_far = 0

    def put(self, rows: Sequence[int], values: dict[str, Tensor]) -> None:
        """Keep what has a place of these rows; the first call decides how many rows have one."""
        if not self.near:
            self._allocate(values)
        rows_near = [place for place, row in enumerate(rows) if row < self.n_near]
        rows_far = [place for place, row in enumerate(rows) if self.n_near <= row < self.n_near + self.n_far]
        for name, value in values.items():
            if rows_near:
                self.near[name][[rows[place] for place in rows_near]] = value[rows_near]
            if rows_far:
                self.far[name][[rows[place] - self.n_near for place in rows_far]] = value[rows_far].cpu()

    def get(self, rows: Sequence[int], missing: Callable[[list[int]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The values of these rows, on the device that they came from.

        Args:
            rows: any of them, also several times.
            missing: computes the values of the rows that have no place.
        """
        if all(row < self.n_near for row in rows):
            start, count = rows[0], len(rows)
            if list(rows) == list(range(start, start + count)):  # as where every step has all examples: no copy
                return {name: value[start : start + count] for name, value in self.near.items()}
            return {name: value[list(rows)] for name, value in self.near.items()}
        near = [place for place, row in enumerate(rows) if row < self.n_near]
        far = [place for place, row in enumerate(rows) if self.n_near <= row < self.n_near + self.n_far]
        rest = [place for place, row in enumerate(rows) if row >= self.n_near + self.n_far]
        again = missing([rows[place] for place in rest]) if rest else {}
        found = {}
        for name, value in self.near.items():
            out = value.new_empty(len(rows), *value.shape[1:])
            if near:
                out[near] = value[[rows[place] for place in near]]
            if far:
                out[far] = self.far[name][[rows[place] - self.n_near for place in far]].to(out.device)
            if rest:
                out[rest] = again[name]
            found[name] = out
        return found

    @property
    def n_bytes(self) -> int:
        """Of memory taken, in both places."""
        return sum(t.numel() * t.element_size() for kept in (self.near, self.far) for t in kept.values())

    def _allocate(self, values: dict[str, Tensor]) -> None:
        row_bytes = max(sum(value[0].numel() * value.element_size() for value in values.values()), 1)
        on_cpu = all(value.device.type == "cpu" for value in values.values())
        near, far = self.budgets
        self.n_near = min(self.n_rows, near // row_bytes)
        self.n_far = 0 if on_cpu else min(self.n_rows - self.n_near, far // row_bytes)
        for name, value in values.items():
            self.near[name] = value.new_empty(self.n_near, *value.shape[1:])
            self.far[name] = torch.empty(self.n_far, *value.shape[1:], dtype=value.dtype, device="cpu")


def prefix_of(constant: dict[str, Tensor], first: int, n_layers: int, batch: Batch, width: int) -> Prefix | None:
    """The keys and values of a batch's columns before the last `width`, for the layers from `first` on.

    Args:
        constant: "keys.l" and "values.l" of these layers; not read where all columns run, which gives None.
        first, n_layers: the lowest layer that runs, and the model's.
        batch: whole.
        width: columns that run.
    """
    n_prefix = batch.input_ids.shape[1] - width
    if n_prefix <= 0:
        return None
    layers = [(constant[f"keys.{index}"], constant[f"values.{index}"]) for index in range(first, n_layers)]
    return Prefix(first, layers, len(batch), n_prefix, batch.input_ids.device)


def right_aligned(value: Tensor, width: int, axis: int) -> Tensor:
    """`value` with zeros before it along `axis`, `width` long; longer ones keep their end."""
    length = value.shape[axis]
    if length >= width:
        return value.narrow(axis, length - width, width)
    shape = list(value.shape)
    shape[axis] = width - length
    return torch.cat([value.new_zeros(shape), value], axis)
