"""Tensors that belong to examples, kept within two memory budgets.

Rows are kept on the model's device up to `cache_bytes`, then in CPU memory up to `spill_bytes`; rows beyond both are
computed again when they are asked for. All tensors are aligned at their last column, as left-padded batches are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class RowStore:
    """Named tensors [N, ...] of which each row belongs to one example.

    Args:
        n_rows: N.
        cache_bytes: budget on the device that the tensors come from.
        spill_bytes: budget in CPU memory for rows that did not fit; not used for tensors that come from the CPU.
        order: all rows; the first ones are kept. None: by their numbers.
    """

    def __init__(self, n_rows: int, cache_bytes: int, spill_bytes: int, order: Sequence[int] | None = None) -> None:
        self.n_rows, self.budgets = n_rows, (cache_bytes, spill_bytes)
        self.place = {row: place for place, row in enumerate(range(n_rows) if order is None else order)}
        self.near: dict[str, Tensor] = {}  # of the rows at the places 0 … n_near − 1
        self.far: dict[str, Tensor] = {}  # of those at the n_far places after them
        self.n_near = self.n_far = 0

    def put(self, rows: Sequence[int], values: dict[str, Tensor]) -> None:
        """Store the rows that fit the memory budgets; the first call decides how many do."""
        if not self.near:
            self._allocate(values)
        slots = [self.place[row] for row in rows]
        rows_near, rows_far, _ = self._split(slots)
        for name, value in values.items():
            if rows_near:
                self.near[name][[slots[index] for index in rows_near]] = value[rows_near]
            if rows_far:
                self.far[name][[slots[index] - self.n_near for index in rows_far]] = value[rows_far].cpu()

    def get(
        self, rows: Sequence[int], missing: Callable[[list[int]], dict[str, Tensor]], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """The values of these rows, on the device that they came from.

        Args:
            rows: any rows, which may be repeated.
            missing: computes the values of rows that are not stored, each given once and in ascending order.
            names: the tensors that are wanted; None: all.
        """
        slots = [self.place[row] for row in rows]
        wanted = {name: self.near[name] for name in (self.near if names is None else names)}
        near, far, rest = self._split(slots)
        if len(near) == len(rows):
            return {name: value[slots] for name, value in wanted.items()}
        once = sorted({rows[index] for index in rest})
        again = missing(once) if rest else {}
        found = {}
        for name, value in wanted.items():
            out = value.new_empty(len(rows), *value.shape[1:])
            if near:
                out[near] = value[[slots[index] for index in near]]
            if far:
                out[far] = self.far[name][[slots[index] - self.n_near for index in far]].to(out.device)
            if rest:
                out[rest] = again[name][[once.index(rows[index]) for index in rest]]
            found[name] = out
        return found

    def has_place(self, row: int) -> bool:
        """Whether a row is kept; before the first `put` none is."""
        return self.place[row] < self.n_kept

    def keep_at_most(self, n_kept: int) -> None:
        """Give up the last places, so that processes that compute rows together miss the same ones."""
        self.n_near, self.n_far = min(self.n_near, n_kept), min(self.n_far, max(n_kept - self.n_near, 0))

    def keep_nothing(self) -> None:
        """Compute every row again whenever it is asked for."""
        self.n_near = self.n_far = 0
        self.near, self.far = (
            {name: value[:0].clone() for name, value in kept.items()} for kept in (self.near, self.far)
        )

    def _split(self, slots: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The indices of the slots that are near, far and not kept."""
        end = self.n_kept
        near = [index for index, slot in enumerate(slots) if slot < self.n_near]
        far = [index for index, slot in enumerate(slots) if self.n_near <= slot < end]
        return near, far, [index for index, slot in enumerate(slots) if slot >= end]

    @property
    def n_kept(self) -> int:
        """The number of rows that have a place, once the first ones were put."""
        return self.n_near + self.n_far

    @property
    def holds_all(self) -> bool:
        """Whether every row has a place, so that nothing is computed again."""
        return self.n_kept == self.n_rows

    @property
    def n_bytes(self) -> int:
        """Memory that is used, in both places."""
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


def right_aligned(value: Tensor, width: int, axis: int) -> Tensor:
    """`value` padded with zeros at its beginning, or cut there, so that it is `width` long along `axis`."""
    length = value.shape[axis]
    if length >= width:
        return value.narrow(axis, length - width, width)
    shape = list(value.shape)
    shape[axis] = width - length
    return torch.cat([value.new_zeros(shape), value], axis)
