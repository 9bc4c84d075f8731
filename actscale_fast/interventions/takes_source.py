"""Interventions that take activations from another run of the model, their source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..architectures.location import Location
from .base import Intervention

_SOURCE_HELP = "with {name}.interchange(source_activations(model, tokenizer, {name}, texts)): ..."


class TakesSource(Intervention, abstract=True):
    """The base class of interventions whose edit reads stored activations, one item for each row of the batch.

    The location has a list of positions and no generated tokens: a source is a prompt, which has none. Tokens that are
    generated after a prompt see its edit through the KV cache.

    Raises:
        ValueError: positions=None, or generated tokens.
    """

    needs_source: ClassVar[bool] = True
    #: What examples call an instance in a message.
    called: ClassVar[str] = "intervention"
    #: While True an edit does nothing, and needs no source.
    paused: bool

    def __init__(self, location: Location, *, n_groups: int | None = None, device: torch.device | None = None) -> None:
        check_source_positions(location.positions, location.generated)
        super().__init__(location, n_groups=n_groups, device=device)
        self.paused = False
        self._sources: list[Tensor] = []  # the last one is in use

    def check_source(self, n_rows: int) -> None:
        if self._sources and self._sources[-1].shape[0] != n_rows:
            raise ValueError(
                f"source: got {self._sources[-1].shape[0]} rows for a batch of {n_rows}, expected one each"
            )

    @contextlib.contextmanager
    def interchange(self, source: Tensor) -> Iterator[Self]:
        """Let the passes inside the `with` block take these activations.

        Args:
            source: [B, L, P, H, D], floating point, as `source_activations` returns it, with one row for each row of
                the batch. In generate() a prompt's row is repeated for its beams or returned sequences.

        Raises:
            TypeError, ValueError: not such a tensor.
        """
        where = self.location
        shape = (len(where.layers), where.n_slots, where.n_heads, where.width)
        if not isinstance(source, Tensor) or not source.is_floating_point():
            got = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise TypeError(f"source: got {got}, expected a floating-point tensor [B, L, P, H, D]")
        if source.dim() != 5 or not source.shape[0] or source.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"source: got shape {tuple(source.shape)}, expected [B, L, P, H, D] = [B, {expected}]")
        self._sources.append(source.to(self.device))
        try:
            yield self
        finally:
            self._sources.pop()

    def source_of(self, layer: int, x: Tensor) -> Tensor:
        """The source of each row at one layer, [B, P, H, D] in float32 or wider.

        Args:
            layer: index among the chosen layers.
            x: the activation that is edited, [B, T, H, D].

        Raises:
            RuntimeError: no `interchange` is open.
            ValueError: the rows do not match.
        """
        if not self._sources:
            help_text = _SOURCE_HELP.format(name=self.called)
            raise RuntimeError(
                f"source: a {type(self).__name__} ran without the source's activations; use `{help_text}`"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        return of_rows(self._sources[-1][:, layer].to(x.device), x.shape[0]).to(wide)


def check_source_positions(positions: object, generated: bool) -> None:
    """Raise a ValueError unless the positions are a list without generated tokens."""
    if positions is None:
        raise ValueError(
            "positions: got None, expected a list: an interchange pairs tokens of the base with tokens of the source, "
            "and prompts of other lengths have no partner for every token"
        )
    if generated:
        raise ValueError("generated: got True, but the source is a prompt: it has no generated tokens to take from")


def of_rows(source: Tensor, n_rows: int) -> Tensor:
    """[S, ...] as [B, ...], each row repeated for its beams."""
    times, rest = divmod(n_rows, source.shape[0])
    if rest or not times:
        raise ValueError(
            f"source: got {source.shape[0]} rows for a batch of {n_rows} rows, expected {n_rows} or a divisor of it"
        )
    return source if times == 1 else source.repeat_interleave(times, 0)
