"""Hooks on a module that torch.compile notices, and that leave no trace once they are removed.

A hook alone is not enough: torch.compile guards a module's class and attributes but not its hooks
(`skip_nnmodule_hook_guards`), so it would silently ignore a hook added after compilation. The class of the module is
therefore swapped for an empty subclass. The guards then fail and the model is traced again with the hook; after
removal, the first graph serves again. Parameters, module names, state_dict keys and `isinstance` stay as they are.
Nothing is set on the original class, so other models are not affected.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
_KEY = "_actscale_fast"
#: The attributes of a module that hold its forward hooks.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
          "_forward_hooks_always_called")  # fmt: skip


class Record:
    """What this package keeps on a marked module.

    Attributes:
        handles: the hooks that were registered with it.
        suspended: while True, forward passes of the module, a decoder, are neither read nor edited.
    """

    def __init__(self) -> None:
        self.handles: dict[str, Any] = {}
        self.suspended = False

    def clean(self, state: dict[str, Any]) -> None:
        """Undo, in a module's `__dict__` or in a copy of it, what the record changed besides hooks."""


class ModuleEdits(Record):
    """The edits of a module's first input and of its output, in the order in which they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self.before: tuple[Edit, ...] = ()
        self.after: tuple[Edit, ...] = ()


def attach(module: nn.Module, edit: Edit, *, before: bool) -> None:
    """Let `edit` change the module's first positional input (`before`) or its output (the first item of a tuple)."""
    edits: ModuleEdits | None = record_of(module)
    if edits is None:
        edits = ModuleEdits()
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
    """Remove `edit`, and with the last edit all traces. An edit that is not attached is ignored."""
    edits: ModuleEdits | None = record_of(module)
    if edits is None:
        return
    edits.before = tuple(other for other in edits.before if other is not edit)
    edits.after = tuple(other for other in edits.after if other is not edit)
    if not edits.before and not edits.after:
        unmark(module)


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
    """The first item of a module's output, or the output itself where it is a single tensor."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, first: Any) -> Any:
    """The output with its first item replaced; a tensor, a tuple or a list, as before."""
    if isinstance(output, tuple):
        return (first, *output[1:])
    return [first, *output[1:]] if isinstance(output, list) else first


def record_of(module: nn.Module) -> Any:
    """The record of a marked module, or None."""
    return module.__dict__.get(_KEY)


def mark(module: nn.Module, record: Record) -> None:
    """Give the module a record and swap its class for the marked one."""
    module.__class__ = marked_class(type(module))  # type: ignore[arg-type]
    module.__dict__[_KEY] = record


def unmark(module: nn.Module) -> None:
    """Undo `mark` and remove the hooks of the record."""
    record: Record = module.__dict__.pop(_KEY)
    for handle in record.handles.values():
        handle.remove()
    record.clean(module.__dict__)
    module.__class__ = plain_class(type(module))


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module without the mark; a class that another library derived from the marked one stays."""
    return cls.__mro__[1] if "_actscale_fast_marked" in cls.__dict__ else cls


@functools.cache
def marked_class(cls: type[nn.Module]) -> type[nn.Module]:
    """An empty subclass with the same name, made once per class, so that patching again recompiles nothing."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "_actscale_fast_marked": True, "__reduce_ex__": _reduce})


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Copy or pickle the module as it is without the patch."""
    if _KEY not in self.__dict__ or plain_class(type(self)) is type(self):
        return object.__reduce_ex__(self, protocol)  # somebody derived the class from the marked one
    state = dict(self.__dict__)
    record: Record = state.pop(_KEY)
    ids = {handle.id for handle in record.handles.values()}
    for name in HOOKS:
        state[name] = type(state[name])((key, value) for key, value in state[name].items() if key not in ids)
    record.clean(state)
    inner = plain_class(type(self))
    if inner.__reduce_ex__ is object.__reduce_ex__ and inner.__reduce__ is object.__reduce__:
        return _rebuild, (inner,), state  # pickle refuses what object.__reduce_ex__ returns for another class
    plain = _rebuild(inner)
    plain.__dict__.update(state)
    return plain.__reduce_ex__(protocol)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


@contextlib.contextmanager
def suspended(decoder: nn.Module) -> Iterator[None]:
    """Run the forward passes inside as if no patch were applied."""
    patches = record_of(decoder)
    if patches is None:
        yield
        return
    before = patches.suspended
    patches.suspended = True
    try:
        yield
    finally:
        patches.suspended = before


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` compute what the module returns; its hooks run around it as before."""
    there = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if there is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = there
