"""The edits of an attention block: its heads before they enter the output projection, and what this returns."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .._token_rows import shift_tokens, steer_heads

#: The name of the submodule that a steered layer holds.
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


class OutputRows(nn.Module):
    """One layer's part of the table at the output of the attention's projection.

    Args:
        index: int64 [max_tokens], the row of each token; shared by all layers.
        output: float32 [R, 1, 1, hidden size].
    """

    index: Tensor
    output: Tensor

    def __init__(self, index: Tensor, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("output", output, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Steer x [N, hidden size]."""
        return shift_tokens(x, self.index, self.output)


def attach(layer: nn.Module, rows: nn.Module) -> None:
    """Let what a layer returns be steered. Must happen before vLLM compiles the model or captures graphs.

    Args:
        layer: an attention layer, or a linear layer, which may return its bias apart, as the second of two.
        rows: what steers it.
    """
    layer.add_module(ATTRIBUTE, rows)
    layer.__class__ = _steered(type(layer))  # type: ignore[assignment, arg-type]


@functools.cache
def _steered(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the same name, so that torch.compile sees another forward method."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned, rows = cls.forward(self, *args, **kwargs), getattr(self, ATTRIBUTE)
        return (rows(returned[0]), *returned[1:]) if isinstance(returned, tuple) else rows(returned)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "forward": forward})
