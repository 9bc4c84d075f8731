"""Gradient checkpointing: a recomputed layer must see the context of the forward pass that it repeats.

The recomputation runs inside the backward pass, when another forward pass may have come between. Transformers hands
each checkpointed layer to `layer._gradient_checkpointing_func`; the `Carrier` in its place remembers the contexts and
puts them back around the repetition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .forward_context import Calls

_NAME = "_gradient_checkpointing_func"


class Carrier:
    """A layer's checkpointing function that carries the contexts of the patches into the recomputation."""

    def __init__(self, checkpoint: Callable[..., Any], calls: Calls) -> None:
        self.checkpoint = checkpoint
        self.calls = calls

    @staticmethod
    def install(layer: nn.Module, calls: Calls) -> None:
        """Put a carrier on a layer that checkpoints; again where checkpointing was switched on anew."""
        checkpoint = layer.__dict__.get(_NAME)
        if checkpoint is not None and not isinstance(checkpoint, Carrier):
            layer.__dict__[_NAME] = Carrier(checkpoint, calls)

    @staticmethod
    def remove(layer: nn.Module) -> None:
        """Give the layer its own function back."""
        carrier = layer.__dict__.get(_NAME)
        if isinstance(carrier, Carrier):
            layer.__dict__[_NAME] = carrier.checkpoint

    def __reduce__(self) -> Any:
        return _itself, (self.checkpoint,)  # a copy of the layer is of one that is not patched

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patches = self.calls.patches
        contexts = [(patch, patch.context) for patch in patches]

        def repeat(*inputs: Any, **named: Any) -> Any:
            if self.calls.patches != patches:
                raise RuntimeError(
                    "patch: the patches changed between a checkpointed forward pass and its backward pass; "
                    "call backward() inside the `with` block"
                )
            before = [(patch, patch.context) for patch in patches]
            for patch, context in contexts:
                patch.context = context
            try:
                return function(*inputs, **named)
            finally:
                for patch, context in before:
                    patch.context = context

        if args and not any(isinstance(value, Tensor) and value.requires_grad for value in args):
            # The reentrant kind drops the gradients of a layer whose inputs need none, as under a frozen model.
            first = args[0]
            if isinstance(first, Tensor) and torch.is_grad_enabled() and self._reentrant():
                args = (first.detach().requires_grad_(), *args[1:])
        return self.checkpoint(repeat, *args, **kwargs)

    def _reentrant(self) -> bool:
        return bool(getattr(self.checkpoint, "keywords", {}).get("use_reentrant", True))


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
