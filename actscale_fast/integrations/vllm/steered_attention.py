"""The edit of an attention layer: its output, the heads side by side, is steered before it enters the projection."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .._token_rows import steer_heads

#: The name of the submodule that a steered attention layer holds.
ATTRIBUTE = "actscale"


class LayerRows(nn.Module):
    """One layer's part of the table: buffers that all layers' graphs take as inputs, so that the graphs are alike.

    Args:
        n_heads: the heads of this rank.
        index: int64 [max_tokens], the row of each token; shared by all layers.
        alpha: float32 [R, 1, H].
        shift: float32 [R, 1, H, D], or None.
        probes: float32 [R, H, D], or None.
    """

    index: Tensor
    alpha: Tensor
    shift: Tensor | None
    probes: Tensor | None

    def __init__(
        self, n_heads: int, index: Tensor, alpha: Tensor, shift: Tensor | None = None, probes: Tensor | None = None
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        # Not in the state_dict, because vLLM loads weights by name.
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("probes", probes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Steer x [N, H·D]."""
        return steer_heads(x, self.index, n_heads=self.n_heads, alpha=self.alpha, shift=self.shift, probes=self.probes)


def attach(attention: nn.Module, rows: LayerRows) -> None:
    """Let the layer's output be steered. Must happen before vLLM compiles the model or captures graphs."""
    attention.add_module(ATTRIBUTE, rows)
    attention.__class__ = _steered(type(attention))  # type: ignore[assignment, arg-type]


@functools.cache
def _steered(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the same name, so that torch.compile sees another forward method."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(self, ATTRIBUTE)(cls.forward(self, *args, **kwargs))  # type: ignore[no-any-return]

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "forward": forward})
