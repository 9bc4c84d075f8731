"""The cases of every op."""

from collections.abc import Callable, Iterator

from ..case import Case, Inputs
from .losses import intervention_loss, linear_softmax
from .optimizer import proximal_adam
from .scaling import dynamic_scale, scale_channels, scale_heads

#: Op of `verdicts.OPS` -> its cases for a device with this many multiprocessors.
CASES: dict[str, Callable[[Inputs, int], Iterator[Case]]] = {
    "scale_heads": scale_heads,
    "dynamic_scale": dynamic_scale,
    "scale_channels": scale_channels,
    "intervention_loss": intervention_loss,
    "linear_softmax": linear_softmax,
    "proximal_adam_": proximal_adam,
}
