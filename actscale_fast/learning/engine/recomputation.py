"""Layers that are computed again in the backward pass, which then keeps their inputs and not their activations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..._log import notice
from ...architectures.layout import ModelLayout
from ...architectures.sharding import stored_as
from ...frozen.partial_forward import PartialForward
from ...modules.hooks import replaced_forward
from ...patching.checkpointing import CheckpointWithContexts

#: Random states need not be restored: the model is in evaluation mode.
_CHECKPOINT: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
#: Tokens of a pass from which on the check of the plain gradient saves memory without having counted it.
_MANY_TOKENS = 1024


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
        self.is_compiled = compiled = (
            _is_compiled(model) or _is_compiled(found.model) or any(map(_is_compiled, found.layers))
        )
        if wanted is True and compiled:
            raise ValueError("recompute: got True for a compiled model, expected the model before torch.compile")
        #: Whether it may still be switched on where memory says so.
        self.may_begin = wanted == "auto" and not compiled
        if wanted is True:
            self._begin()
        elif self.may_begin and _is_offloaded(found):
            self.begin("layers are offloaded, and their weights would be kept with the activations")

    def begin(self, why: str) -> None:
        """Switch it on because memory says so, and log one line."""
        notice(f"recompute: {why}; each layer is computed again in the backward pass")
        self._begin()

    def _begin(self) -> None:
        self.may_begin = False
        self.section.wrap_layer = functools.partial(
            CheckpointWithContexts.around, decoder=self.found.decoder, checkpoint=_CHECKPOINT
        )

    @property
    def is_on(self) -> bool:
        return self.section.wrap_layer is not None


class _RepeatedForward:
    """The forward of a layer that is computed again in the backward pass."""

    def __init__(self, layer: nn.Module, found: ModelLayout) -> None:
        self.wrapped_forward = layer.__dict__.get("forward")  # see `module_paths.own_forward`
        self.forward = CheckpointWithContexts.around(layer.forward, found.decoder, _CHECKPOINT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@contextlib.contextmanager
def layers_recomputed(found: ModelLayout, wanted: bool | str, n_tokens: int) -> Iterator[None]:
    """Let whole passes of a patched model compute their layers again, if asked for, or if that may save much memory.

    Args:
        found: the model's layout.
        wanted: True, False or "auto".
        n_tokens: the tokens of a pass.
    """
    with contextlib.ExitStack() as stack:
        if wanted is True or (wanted == "auto" and (n_tokens > _MANY_TOKENS or _is_offloaded(found))):
            for layer in found.layers:
                stack.enter_context(replaced_forward(layer, _RepeatedForward(layer, found)))
        yield


def _is_offloaded(found: ModelLayout) -> bool:
    return any(stored_as(p) == "meta" for layer in found.layers for p in layer.parameters())


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
