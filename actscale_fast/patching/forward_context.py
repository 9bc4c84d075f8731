"""What an edit knows of the running forward pass, and what the patches of one model share between passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.arguments import argument_names
from ..interventions.placement import Placement
from ..modules import hooks
from ..modules.module_paths import ModulePaths
from .announced_prompt import AnnouncedPrompt
from .forward_call import Call


@dataclass(eq=False)
class Context:
    """One patch's view of one forward pass, shared by all of its layers."""

    placement: Placement | None  # None: this pass holds no token to edit
    strength: float | Tensor
    n_rows: int | None = None
    device: torch.device | None = None  # of the tensors in placement and strength; None: there are none
    copies: dict[torch.device, Context] = field(default_factory=dict)
    #: The layers whose edit has run in this pass, in order.
    used: list[int] = field(default_factory=list)
    #: The number of last tokens that the last layers may be reduced to, where the caller asked for no other logits.
    n_last: int | None = None

    def use(self, layer: int) -> None:
        """Note that the edit of a layer runs. A compiled layer cannot; it says once that it is compiled."""
        if torch.compiler.is_compiling():
            _note_compiled()
        else:
            self.used.append(layer)

    def on(self, device: torch.device) -> Context:
        """The context for a layer on `device`, copied there once per forward pass."""
        if self.device is None or self.device == device:
            return self
        if device not in self.copies:
            placement = None if self.placement is None else self.placement.to(device)
            strength = self.strength.to(device) if isinstance(self.strength, Tensor) else self.strength
            self.copies[device] = Context(placement, strength, self.n_rows, device, used=self.used, n_last=self.n_last)
        return self.copies[device]


_compiled: list[bool] = []


def _note_compiled() -> int:
    """Runs while a graph is traced, but not when the graph runs."""
    _compiled.append(True)
    return 0


# What torch.compiler.assume_constant_result does, which imports all of the compiler.
_note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def uses_are_counted() -> bool:
    """Whether `Context.used` is complete: False once any edit has been compiled."""
    return not _compiled


class ActivePatch:
    """A patch as the forward passes of its model see it: for each pass it is asked for a context."""

    #: The context of the running forward pass.
    context: Context | None = None
    #: The layers whose edits each run once per pass of all layers; None: that cannot be told.
    counted: tuple[int, ...] | None = None
    #: The modules that must stay where they are while the patch is on.
    module_paths: ModulePaths | None = None

    @property
    def reads_arguments(self) -> bool:
        """Whether its edits depend on the arguments of the pass: on its rows or on the places of its tokens."""
        return False

    @property
    def reads_positions(self) -> bool:
        """Whether it must know where each token stands in its prompt."""
        return False

    def context_of(self, call: Call) -> Context | None:
        """The context of one forward pass."""
        raise NotImplementedError

    def checkpointed_layers(self) -> list[nn.Module]:
        """The layers that must see the context again when gradient checkpointing recomputes them."""
        return []


class ModelPatches(hooks.Record):
    """The patches of one model and its announced prompt; kept on the decoder, the module that owns the layers."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.patches: tuple[ActivePatch, ...] = ()
        self.announced: AnnouncedPrompt | None = None
        self.names = argument_names(decoder)
        #: Site checks that could not run when their patch was applied; they run before the first forward pass.
        self.pending: list[tuple[ActivePatch, Callable[[], None]]] = []
        #: The arguments of the whole model's pass that is running.
        self.model_arguments: dict[str, Any] | None = None
        #: While True, passes may leave out layers: partial runs, and drafts of a model for itself.
        self.leaves_out = False
        #: The thread in which a pass is running.
        self.thread: int | None = None

    @contextlib.contextmanager
    def announcing(self, announced: AnnouncedPrompt) -> Iterator[None]:
        """Tell the forward passes inside which prompt is being processed."""
        before = self.announced
        self.announced = announced
        try:
            yield
        finally:
            self.announced = before


def patches_of(decoder: nn.Module) -> tuple[ActivePatch, ...]:
    """The patches of a model, in the order in which they were applied."""
    found: ModelPatches | None = hooks.record_of(decoder)
    return () if found is None else found.patches
