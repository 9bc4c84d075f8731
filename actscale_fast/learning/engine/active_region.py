"""The part of the computation that an intervention can change; everything else is computed once and kept.

Layers below the lowest steered one give the same hidden states in every step, and tokens before the first steered one
the same keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...interventions import Intervention
from ..encoded_examples import EncodedExamples


@dataclass(frozen=True, slots=True)
class ActiveRegion:
    """The layers and columns of left-padded prompts that have to run in every step."""

    first_layer: int  # the lowest layer that runs; the output of the layer below is constant
    width: int  # number of columns that run, counted from the last
    longest: int  # tokens of the longest prompt

    @property
    def n_prefix(self) -> int:
        """Number of columns before those that run."""
        return self.longest - self.width

    @property
    def is_whole(self) -> bool:
        """Whether everything runs, so that nothing is kept."""
        return self.first_layer == 0 and self.n_prefix == 0


def active_region(intervention: Intervention, data: EncodedExamples) -> ActiveRegion:
    """The part of the computation that the intervention can change on these examples."""
    locations = [single.location for single in intervention.singles]
    longest = max(map(len, data.prompts))
    first = min(location.first_changed(min(location.layers)) for location in locations)
    positions: list[int] = []
    for location in locations:
        if location.positions is None:
            return ActiveRegion(first, longest, longest)
        positions += location.positions
    return ActiveRegion(first, max(_n_active(len(prompt), positions) for prompt in data.prompts), longest)


def _n_active(length: int, positions: Sequence[int]) -> int:
    """Number of tokens from the first steered one to the end of a prompt; 1 if none is steered."""
    from_end = [length - position if position >= 0 else -position for position in positions]
    return max((tokens for tokens in from_end if 0 < tokens <= length), default=1)
