"""Gradient checkpointing: a recomputed layer must see the contexts of the forward pass that it repeats.

The recomputation runs inside the backward pass, when other forward passes may have come between. Transformers calls
each checkpointed layer through `layer._gradient_checkpointing_func`; the replacement here remembers the contexts and
restores them for the recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import hooks
from .forward_context import ModelPatches

_NAME = "_gradient_checkpointing_func"


class CheckpointWithContexts:
    """A layer's checkpointing function that restores the contexts of all patches for the recomputation."""

    def __init__(self, checkpoint: Callable[..., Any], model_patches: ModelPatches) -> None:
        self.checkpoint = checkpoint
        self.model_patches = model_patches

    @staticmethod
    def install(layer: nn.Module, model_patches: ModelPatches) -> None:
        """Replace the checkpointing function of a layer that has one and has not been changed yet."""
        checkpoint = layer.__dict__.get(_NAME)
        if checkpoint is not None and not isinstance(checkpoint, CheckpointWithContexts):
            layer.__dict__[_NAME] = CheckpointWithContexts(checkpoint, model_patches)

    @staticmethod
    def remove(layer: nn.Module) -> None:
        """Give the layer its own function back."""
        found = layer.__dict__.get(_NAME)
        if isinstance(found, CheckpointWithContexts):
            layer.__dict__[_NAME] = found.checkpoint

    @staticmethod
    def around(forward: Callable[..., Any], decoder: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that is checkpointed with the contexts of all patches of its model.

        Args:
            forward: the layer's forward.
            decoder: the module that owns the layers of a patched model.
            checkpoint: the checkpointing function.
        """
        return functools.partial(CheckpointWithContexts(checkpoint, hooks.record_of(decoder)), forward)

    def __reduce__(self) -> Any:
        return _itself, (self.checkpoint,)  # a copy of the layer is not patched

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patches = self.model_patches.patches
        contexts = [(patch, patch.context) for patch in patches]

        def repeat(*inputs: Any, **named: Any) -> Any:
            if self.model_patches.patches != patches:
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
            # Reentrant checkpointing drops the gradients of a layer whose inputs need none, as in a frozen model.
            reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant", True)
            if isinstance(args[0], Tensor) and torch.is_grad_enabled() and reentrant:
                args = (args[0].detach().requires_grad_(), *args[1:])
        return self.checkpoint(repeat, *args, **kwargs)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
