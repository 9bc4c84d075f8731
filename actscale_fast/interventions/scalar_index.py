"""`scalars[layer, head]`: which entries of the scalars α [G, L, P, H] an index names.

Layers are named by their numbers in the model, and the slots of positions by the positions themselves, as `for_model`
takes them; heads count from 0 or, if negative, from the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import is_integer
from .._tables import ranges
from ..architectures.location import Location

Position = int | str | None


class ScalarRow(NamedTuple):
    """One activation scalar and its place."""

    layer: int
    head: int | None  # None: the site has no heads
    position: Position  # None: every token; "generated": the slot of generated tokens
    value: float
    group: int | None = None  # in a stack of interventions


@dataclass(frozen=True, slots=True)
class Axis:
    """The chosen indices along one axis of α."""

    indices: Sequence[int]
    is_single: bool = False  # the axis is dropped from the result
    is_list: bool = False  # given as a list, whose order counts; a slice is a view


class Selection:
    """The entries that an index names, in the order of the index: [group,] layer, head, position.

    Raises:
        TypeError: an index of another type.
        IndexError: too many indices, or one that the intervention does not hold; the message names those held.
    """

    def __init__(self, location: Location, n_groups: int | None, key: object) -> None:
        keys = list(key) if isinstance(key, tuple) else [key]
        has_heads, has_positions = location.site == "head", location.positions is not None
        names = ["group"] * (n_groups is not None) + ["layer"] + ["head"] * has_heads + ["position"] * has_positions
        if len(keys) > len(names):
            raise IndexError(f"got {len(keys)} indices, expected at most [{', '.join(names)}] of this intervention")
        given: dict[str, Any] = dict(zip(names, keys, strict=False))
        self._location = location
        group = Axis([0], is_single=True)
        if n_groups is not None:
            group = _axis("group", given.get("group", slice(None)), list(range(n_groups)), lambda i: i % n_groups)
        layer = self._layer(given.get("layer", slice(None)))
        head = self._head(given.get("head", slice(None)), layer) if has_heads else Axis([0], is_single=True)
        slot = Axis([0], is_single=True)
        if has_positions and ("position" in given or location.n_slots > 1):
            slot = self._position(given.get("position", slice(None)))
        self._axes = (group, layer, head, slot)
        self._is_stack = n_groups is not None

    def of(self, alpha: Tensor) -> Tensor:
        """The chosen entries of α: a view, unless a list of indices was given; 0-d where the index names one scalar."""
        chosen = self._in_order(alpha)
        for dim, axis in reversed(list(enumerate(self._axes))):
            if axis.is_single:
                chosen = chosen.select(dim, axis.indices[0])
            elif axis.is_list:
                chosen = chosen.index_select(dim, chosen.new_tensor(axis.indices, dtype=torch.int64))
            else:
                first, last = axis.indices[0], axis.indices[-1]
                chosen = chosen[(*[slice(None)] * dim, slice(first, last + 1, _step(axis.indices)))]
        return chosen

    def put(self, alpha: Tensor, value: Tensor) -> None:
        """Write a value, broadcast to the chosen entries, into α.

        Raises:
            ValueError: a shape that cannot be broadcast to them.
        """
        shape = [len(axis.indices) for axis in self._axes if not axis.is_single]
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise ValueError(f"value: got shape {tuple(value.shape)}, expected {tuple(shape)} or a number") from None
        for dim, axis in enumerate(self._axes):
            value = value.unsqueeze(dim) if axis.is_single else value
        target = self._in_order(alpha)
        mesh = [
            target.new_tensor(axis.indices, dtype=torch.int64).view([-1 if other == dim else 1 for other in range(4)])
            for dim, axis in enumerate(self._axes)
        ]
        target[tuple(mesh)] = value.clone()  # it may be a view of α, after `scalars[3] *= 2`

    def _in_order(self, alpha: Tensor) -> Tensor:
        """α as a view [G, L, H, P]."""
        return (alpha if self._is_stack else alpha.unsqueeze(0)).transpose(2, 3)

    def _layer(self, key: Any) -> Axis:
        n_layers, held = self._location.model.n_layers, self._location.layers

        def index_of(layer: int) -> int:
            number = layer + n_layers if -n_layers <= layer < 0 else layer
            if number not in held:
                raise IndexError(f"layer: got {layer}, but the intervention holds {_layers(held)}")
            return held.index(number)

        if isinstance(key, slice):
            wanted = range(*key.indices(n_layers))
            indices = [index for index, layer in enumerate(held) if layer in wanted]
            if not indices:
                raise IndexError(f"layer: got {_shown(key)}, but the intervention holds {_layers(held)}")
            return _regular("layer", key, indices, is_forward=wanted.step > 0)
        return _axis("layer", key, list(range(len(held))), index_of)

    def _head(self, key: Any, layers: Axis) -> Axis:
        counts = sorted({self._location.heads_of(index) for index in layers.indices})
        if len(counts) > 1:
            raise IndexError(
                f"head: the chosen layers have {' or '.join(map(str, counts))} heads; index layers of one number"
            )
        (n_heads,) = counts

        def index_of(head: int) -> int:
            if not -n_heads <= head < n_heads:
                raise IndexError(f"head: got {head}, expected {-n_heads} to {n_heads - 1}: the layer has {n_heads}")
            return head % n_heads

        return _axis("head", key, list(range(n_heads)), index_of)

    def _position(self, key: Any) -> Axis:
        names = positions_of(self._location)

        def index_of(position: Any) -> int:
            if position not in names:
                raise IndexError(f"position: got {position!r}, but the intervention holds {names}")
            return names.index(position)

        if isinstance(key, slice) and key != slice(None):
            raise IndexError(f"position: got {_shown(key)}, expected ':', a position or a list, of {names}")
        return _axis("position", key, list(range(len(names))), index_of, names=("generated",))


def positions_of(location: Location) -> list[Position]:
    """The name of each slot: its position, "generated", or None where all tokens share one."""
    return [None] if location.positions is None else [*location.slots]


def scalar_rows(alpha: Tensor, location: Location, n_groups: int | None) -> list[ScalarRow]:
    """Every scalar with its place, in the order of α; heads that a layer does not have are left out."""
    values = (alpha if n_groups is not None else alpha.unsqueeze(0)).detach().cpu().tolist()
    names = positions_of(location)
    return [
        ScalarRow(
            layer=location.layers[index],
            head=head if location.site == "head" else None,
            position=name,
            value=values[group][index][slot][head],
            group=None if n_groups is None else group,
        )
        for group in range(len(values))
        for index in range(len(location.layers))
        for slot, name in enumerate(names)
        for head in range(location.heads_of(index))
    ]


def _axis(name: str, key: Any, every: list[int], index_of: Callable[[Any], int], names: tuple[str, ...] = ()) -> Axis:
    """The chosen indices of one axis, from one index, a slice of its indices or a list."""

    def is_one(value: object) -> bool:
        return is_integer(value) or (isinstance(value, str) and value in names)

    if is_one(key):
        return Axis([index_of(key)], is_single=True)
    if isinstance(key, slice):
        return _regular(name, key, every[key], is_forward=key.step is None or key.step > 0)
    if isinstance(key, list | range) and key and all(map(is_one, key)):
        return Axis([index_of(one) for one in key], is_list=True)
    raise TypeError(f"{name}: got {key!r}, expected a number, ':', a slice or a list of numbers")


def _regular(name: str, key: slice, indices: list[int], *, is_forward: bool) -> Axis:
    """The axis of a slice, which must be one of the stored scalars too, so that the result is a view of them."""
    if not indices:
        raise IndexError(f"{name}: got {_shown(key)}, which names none of those that there are")
    if not is_forward or indices != list(range(indices[0], indices[-1] + 1, _step(indices))):
        raise IndexError(f"{name}: got {_shown(key)}, expected a slice in the stored order; pass a list of numbers")
    return Axis(indices)


def _step(indices: Sequence[int]) -> int:
    return indices[1] - indices[0] if len(indices) > 1 else 1


def _layers(held: Sequence[int]) -> str:
    return f"layer{'s' * (len(held) != 1)} {ranges(held)}"


def _shown(key: slice) -> str:
    ends = ["" if end is None else str(end) for end in (key.start, key.stop)]
    return ":".join(ends + ([] if key.step is None else [str(key.step)]))
