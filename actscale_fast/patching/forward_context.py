"""What the edits must know of the forward pass they stand in: rows, padding, how much is prompt, how long the cache is.

The module that owns the layers sees all of it in its arguments, whoever calls it. A pre-hook there builds one `Context`
per patch and forward pass, shared by all layers and made without a synchronisation; `generation` tells the prompt.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..architectures.arguments import argument_names, named
from ..interventions.positions import Placement, Prompt
from ..modules import hooks
from ..modules.module_paths import Links
from .checkpointing import Carrier
from .forward_call import Call, read
from .generation import Announced, Generation, refuse_unannounced


@dataclass(eq=False)
class Context:
    """One patch's view of one forward pass."""

    placement: Placement | None  # None: this pass holds no token to edit
    strength: float | Tensor
    n_rows: int | None = None
    device: torch.device | None = None  # where the tensors of placement and strength lie; None: there are none
    elsewhere: dict[torch.device, Context] = field(default_factory=dict)
    #: The layers whose edit has run in this pass, in order.
    used: list[int] = field(default_factory=list)
    #: Tokens at the end of the pass that its last layers may be left with, where the caller wants no other logits.
    n_last: int | None = None

    def use(self, layer: int) -> None:
        """Note that the edit of a layer runs; a compiled layer cannot, and says once that it is one."""
        if torch.compiler.is_compiling():
            _note_compiled()
        else:
            self.used.append(layer)

    def on(self, device: torch.device) -> Context:
        """The context for a layer on `device`; copied there once a forward pass."""
        if self.device is None or self.device == device:
            return self
        if device not in self.elsewhere:
            placement = None if self.placement is None else self.placement.to(device)
            strength = self.strength.to(device) if isinstance(self.strength, Tensor) else self.strength
            self.elsewhere[device] = Context(
                placement, strength, self.n_rows, device, used=self.used, n_last=self.n_last
            )
        return self.elsewhere[device]


#: Filled once an edit has been compiled: from then on uses are not counted.
_compiled: list[bool] = []


@torch.compiler.assume_constant_result
def _note_compiled() -> int:
    """Runs while a graph is traced, and not with the graph."""
    _compiled.append(True)
    return 0


class Contextual(Protocol):
    """A patch, as far as this file needs to know it."""

    context: Context | None
    #: The layers, each of whose edits runs once in a pass of all layers; None: that cannot be told.
    counted: tuple[int, ...] | None
    #: The modules that must stay where they are while the patch is on.
    links: Links

    @property
    def reads_calls(self) -> bool:
        """Whether it must know the pass's rows or the places of its tokens."""

    @property
    def places_tokens(self) -> bool:
        """Whether it must know where each token stands in its prompt."""

    def enter(self, call: Call) -> Context: ...
    def carriers(self) -> list[nn.Module]: ...


class Calls:
    """The patches of one model and the prompt they are in; lives on the module that owns the layers."""

    def __init__(self, decoder: nn.Module) -> None:
        self.patches: tuple[Contextual, ...] = ()
        self.announced: Announced | None = None
        self.names = argument_names(decoder)
        #: Checks of patches that wait for the first forward pass, which they run before; see `check`.
        self.pending: list[tuple[Contextual, Callable[[], None]]] = []
        #: While True, forward passes edit nothing and are not read.
        self.suspended = False
        #: The arguments of the whole model's pass that is running.
        self.outer: dict[str, Any] | None = None
        #: While True, passes leave layers out, as sections do and drafts of a model for itself.
        self.leaves_out = False
        self.thread: int | None = None  # in which a pass is running
        self.handles: dict[str, Any] = {
            "enter": decoder.register_forward_pre_hook(_enter, with_kwargs=True),
            "leave": decoder.register_forward_hook(_leave, always_call=True),
        }

    def clean(self, state: dict[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def announcing(self, announced: Announced) -> Iterator[None]:
        """Let the forward passes inside know the prompt."""
        before = self.announced
        self.announced = announced
        try:
            yield
        finally:
            self.announced = before

    def says(self, prompt: Prompt) -> contextlib.AbstractContextManager[None]:
        """All forward passes inside are of this prompt."""
        return self.announcing(Announced(prompt, every_pass=True))


def join(decoder: nn.Module, model: nn.Module, patch: Contextual) -> Calls:
    """Add a patch to the model's calls; the first one hooks the decoder and wraps generate()."""
    calls: Calls | None = hooks.record_of(decoder)
    if calls is None:
        calls = Calls(decoder)
        hooks.mark(decoder, calls)
    if model is not decoder and hooks.record_of(model) is None:
        generation = Generation(model, calls, Links(model, [path_of(model, decoder)]))
        generation.handles["enter"] = model.register_forward_pre_hook(_enter_model, with_kwargs=True)
        generation.handles["leave"] = model.register_forward_hook(_leave_model, always_call=True)
        hooks.mark(model, generation)
    calls.patches += (patch,)
    return calls


def path_of(model: nn.Module, part: nn.Module) -> str:
    """The path of a part of a model."""
    return next(name for name, module in model.named_modules() if module is part)


def patches_of(decoder: nn.Module) -> tuple[Contextual, ...]:
    """The patches of a model, in the order in which they were applied."""
    calls: Calls | None = hooks.record_of(decoder)
    return () if calls is None else calls.patches


def part(decoder: nn.Module, patch: Contextual) -> bool:
    """Take a patch out of the calls; with the last one the decoder is as it was. Whether that is so now."""
    calls: Calls | None = hooks.record_of(decoder)
    if calls is None:
        return True
    calls.patches = tuple(other for other in calls.patches if other is not patch)
    calls.pending = [(other, late) for other, late in calls.pending if other is not patch]
    if calls.patches:
        return False
    hooks.unmark(decoder)
    return True


def _enter_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a pass of the whole model: a decoder that was exchanged would run without any of its hooks."""
    generation: Generation = hooks.record_of(model)
    generation.above.check()
    generation.calls.outer = named(generation.names, args, kwargs)


def _leave_model(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hooks.record_of(model).calls.outer = None


def _enter(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls: Calls = hooks.record_of(decoder)
    if calls.suspended:
        for patch in calls.patches:
            patch.context = Context(None, 0.0)
        return
    while calls.pending:
        if torch.compiler.is_compiling():
            raise RuntimeError("patch: the model has not been checked yet; run a forward pass before it is compiled")
        calls.pending[-1][1]()
        calls.pending.pop()  # not before: a check that fails fails again
    call = replace(read(calls.names, args, kwargs), outer=calls.outer, makes_cache=_makes_cache(decoder, kwargs))
    if any(patch.places_tokens for patch in calls.patches):
        call.understood()
        if calls.announced is None and not torch.compiler.is_compiling():
            refuse_unannounced(call)
    if calls.announced is not None and any(patch.reads_calls for patch in calls.patches):
        call = replace(call, prompt=calls.announced.prompt_of(call))
    if not torch.compiler.is_compiling():
        own = threading.get_ident()
        if calls.thread not in (None, own):
            raise RuntimeError(
                "patch: another forward pass of this model is running in another thread; run one at a time"
            )
        calls.thread = own
    for patch in calls.patches:
        patch.links.check()
        patch.context = patch.enter(call)
        patch.context.n_last = _n_last(calls.outer)
    if decoder.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for patch in calls.patches:
            for layer in patch.carriers():
                Carrier.install(layer, calls)


def _leave(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    calls: Calls = hooks.record_of(decoder)
    contexts = [(patch.counted, patch.context) for patch in calls.patches]
    for patch in calls.patches:
        patch.context = None
    calls.thread = None
    if torch.compiler.is_compiling() or _compiled or output is None or decoder.training:
        return  # uses were not counted, an error is on its way, or layers may be dropped
    if calls.leaves_out or calls.suspended:
        return
    for counted, context in contexts:
        if counted is None or context is None or context.placement is None or tuple(context.used) == counted:
            continue
        for layer in counted:
            count = context.used.count(layer)
            if count != 1:
                times = "did not run" if not count else f"ran {count} times"
                raise RuntimeError(
                    f"patch: the intervention at layer {layer} {times} in this forward pass, expected once: a module "
                    "is bypassed, fused, left out or used again"
                )


def _makes_cache(decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder that was handed no cache makes one."""
    wanted = kwargs.get("use_cache")
    return bool(getattr(getattr(decoder, "config", None), "use_cache", False) if wanted is None else wanted)


def _n_last(outer: dict[str, Any] | None) -> int | None:
    kept = None if outer is None else outer.get("logits_to_keep")
    return kept if isinstance(kept, int) and kept > 0 else None
