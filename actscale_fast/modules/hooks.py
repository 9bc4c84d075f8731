"""How an edit gets into a module, and out again without a trace.

A hook alone is not enough: torch.compile guards a module's class and attributes but not its hooks
(`skip_nnmodule_hook_guards`), so a hook added to a compiled model is silently ignored. The module's class is
therefore swapped for an empty subclass of it: the guards fail, the model is traced again with the hook in it, and
after removal the first graph serves again. Parameters, module names, state_dict keys and `isinstance` stay as they
are; nothing is set on the class itself, so other models never see it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
_KEY = "_actscale_fast"
#: The attributes of a module that hold its forward hooks.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called")  # fmt: skip


class Record(Protocol):
    """What a marked module carries: the handles of the hooks that belong to it."""

    handles: dict[str, Any]

    def clean(self, state: dict[str, Any]) -> None:
        """Undo, in a module's `__dict__` or a copy of it, what the record put there besides hooks."""


class Edits:
    """What is done to one module's first input and to its output, in the order in which the patches were applied."""

    def __init__(self) -> None:
        self.before: tuple[Edit, ...] = ()
        self.after: tuple[Edit, ...] = ()
        self.handles: dict[str, Any] = {}

    def clean(self, state: dict[str, Any]) -> None:
        pass


def attach(module: nn.Module, edit: Edit, *, before: bool) -> None:
    """Let `edit` change the module's first positional input (`before`) or its output (the first item of a tuple)."""
    edits: Edits | None = record_of(module)
    if edits is None:
        edits = Edits()
        mark(module, edits)
    if before:
        edits.before += (edit,)
        if "before" not in edits.handles:
            edits.handles["before"] = module.register_forward_pre_hook(_edit_input)
    else:
        edits.after += (edit,)
        if "after" not in edits.handles:
            # First among the output hooks, so that recorded hidden states are those that the next layer gets.
            edits.handles["after"] = module.register_forward_hook(_edit_output, prepend=True)


def detach(module: nn.Module, edit: Edit) -> None:
    """Take `edit` out; with the last one the module is as it was. An edit that is not there is ignored."""
    edits: Edits | None = record_of(module)
    if edits is None:
        return
    edits.before = tuple(other for other in edits.before if other is not edit)
    edits.after = tuple(other for other in edits.after if other is not edit)
    if not edits.before and not edits.after:
        unmark(module)


def record_of(module: nn.Module) -> Any:
    """The record of a marked module, or None."""
    return module.__dict__.get(_KEY)


def mark(module: nn.Module, record: Record) -> None:
    """Give the module a record and swap its class for the marked one."""
    module.__class__ = marked_class(type(module))  # type: ignore[arg-type]
    module.__dict__[_KEY] = record


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A module's class without the mark; another library's that it was given under the mark stays."""
    return cls.__mro__[1] if "_actscale_fast_marked" in cls.__dict__ else cls


def unmark(module: nn.Module) -> None:
    """The inverse of `mark`; removes the record's hooks too."""
    record: Record = module.__dict__.pop(_KEY)
    for handle in record.handles.values():
        handle.remove()
    record.clean(module.__dict__)
    module.__class__ = plain_class(type(module))


@functools.cache
def marked_class(cls: type[nn.Module]) -> type[nn.Module]:
    """An empty subclass of the same name; one per class, so that patching again compiles nothing again."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "_actscale_fast_marked": True, "__reduce_ex__": _reduce})


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copies and pickles are of the module as it is without the patch, as its own class has them."""
    if _KEY not in self.__dict__ or plain_class(type(self)) is type(self):
        return object.__reduce_ex__(self, protocol)  # of a class that somebody else made from the marked one
    state = dict(self.__dict__)
    record: Record = state.pop(_KEY)
    ids = {handle.id for handle in record.handles.values()}
    for name in HOOKS:
        state[name] = type(state[name])((key, value) for key, value in state[name].items() if key not in ids)
    record.clean(state)
    inner = plain_class(type(self))
    if inner.__reduce_ex__ is object.__reduce_ex__ and inner.__reduce__ is object.__reduce__:
        return _rebuild, (inner,), state  # what object's method returns pickle refuses for an object of another class
    plain = _rebuild(inner)
    plain.__dict__.update(state)
    return plain.__reduce_ex__(protocol)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _edit_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args:
        raise RuntimeError(
            f"{type(module).__name__} was called without a positional input, so its heads cannot be scaled"
        )
    x = args[0]
    for edit in module.__dict__[_KEY].before:
        x = edit(x)
    return (x, *args[1:])


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    y = first_of(output)
    for edit in module.__dict__[_KEY].after:
        y = edit(y)
    return with_first(output, y)


def first_of(output: Any) -> Any:
    """What a module's output begins with, or the output itself where it is one tensor."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, first: Any) -> Any:
    """The output with another beginning, of the same kind: a tensor, a tuple or a list."""
    if isinstance(output, tuple):
        return (first, *output[1:])
    return [first, *output[1:]] if isinstance(output, list) else first


@contextlib.contextmanager
def suspended(decoder: nn.Module) -> Iterator[None]:
    """Let the forward passes inside run as if no patch were applied."""
    calls = record_of(decoder)
    if calls is None:
        yield
        return
    before = calls.suspended
    calls.suspended = True
    try:
        yield
    finally:
        calls.suspended = before


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of this module, between its hooks, go to `forward`."""
    there = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if there is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = there
