"""Layers that are computed again in the backward pass, which then keeps their inputs and not their activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..._log import notice
from ...architectures.layout import ModelLayout
from ...architectures.sharding import stored_as
from ...frozen.partial_forward import PartialForward
from ...patching.checkpointing import CheckpointWithContexts


class Recomputation:
    """Whether the layers of an open model are computed again, and the switch.

    Args:
        found: the model's layout.
        model: what is called: the model, or its compiled wrapper.
        section: its open partial forward pass.
        wanted: True, False or "auto".

    Raises:
        ValueError: True for a compiled model.
    """

    def __init__(self, found: ModelLayout, model: nn.Module, section: PartialForward, wanted: bool | str) -> None:
        self.found, self.section = found, section
        compiled = _is_compiled(model) or _is_compiled(found.model) or any(map(_is_compiled, found.layers))
        if wanted is True and compiled:
            raise ValueError("recompute: got True for a compiled model, expected the model before torch.compile")
        #: Whether it may still be switched on where memory says so.
        self.may_begin = wanted == "auto" and not compiled
        if wanted is True:
            self._begin()
        elif self.may_begin and any(stored_as(p) == "meta" for layer in found.layers for p in layer.parameters()):
            self.begin("layers are offloaded, and their weights would be kept with the activations")

    def begin(self, why: str) -> None:
        """Switch it on because memory says so, and log one line."""
        notice(f"recompute: {why}; each layer is computed again in the backward pass")
        self._begin()

    def _begin(self) -> None:
        self.may_begin = False
        # Random states need not be restored: the model is in evaluation mode.
        function: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self.section.wrap_layer = functools.partial(
            CheckpointWithContexts.around, decoder=self.found.decoder, checkpoint=function
        )

    @property
    def is_on(self) -> bool:
        return self.section.wrap_layer is not None


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
