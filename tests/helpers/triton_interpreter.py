"""Triton's interpreter spends most of its time on finding out anew what it knew before; here it finds it out once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


@functools.cache
def remember_lookups() -> None:
    """Replace `triton.language` by its interpreted form once a launch, not at every call of a function in a kernel, and
    describe equal types and shapes once. A Triton whose interpreter is built otherwise is left as it is.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from triton.runtime import interpreter

        replace, scope = interpreter._patch_lang, interpreter._LangPatchScope
        numpy_type, plain = interpreter._get_np_dtype, interpreter.tl.dtype
        known = functools.cache(numpy_type)
        interpreter._patch_lang = _once_a_launch(replace, scope)
        interpreter._get_np_dtype = lambda kind: known(kind.scalar) if type(kind.scalar) is plain else numpy_type(kind)
        _describe_once(interpreter.tl)


def _once_a_launch(replace: Callable[[Any], Any], empty: type[Any]) -> Callable[[Any], Any]:
    """`replace` for a launch, and for what it calls of another part of the language; else there is nothing to do."""
    replaced: set[str] = set()  # by the launch that runs now

    class Launch(empty):
        """What a launch replaces; at its end the language is restored."""

        def __init__(self, changes: Any) -> None:
            super().__init__()
            self._all = changes

        def restore(self) -> None:
            replaced.clear()
            self._all.restore()

    def once(function: Any) -> Any:
        parts, launch = _parts_of_the_language(function), not replaced
        if parts <= replaced and not launch:
            return empty()
        changes = replace(function)
        replaced.update(parts)
        return Launch(changes) if launch else changes

    return once


def _describe_once(language: Any) -> None:
    """What follows from a tensor's type and shape is worked out for the first one alone; nothing changes it later."""
    dtype, block, tensor = language.dtype, language.block_type, language.tensor
    make_type, make_tensor = block.__init__, tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}

    def described(element: Any, shape: Any) -> Any:
        """What equal types and shapes share; None of pointers."""
        plain = type(element) is dtype and all(type(size) is int for size in shape)
        return (element.name, *shape) if plain else None

    def type_of(self: Any, element: Any, shape: Any) -> None:
        key = described(element, shape)
        if key not in types:
            make_type(self, element, shape)
            if key is not None:
                types[key] = dict(vars(self))
        else:
            vars(self).update(types[key])

    def tensor_of(self: Any, handle: Any, kind: Any) -> None:
        key = described(kind.scalar, kind.shape if type(kind) is block else ())
        if key not in tensors:
            make_tensor(self, handle, kind)
            if key is not None:
                tensors[key] = dict(vars(self))
        else:
            vars(self).update(tensors[key], handle=handle)

    block.__init__, tensor.__init__ = type_of, tensor_of


@functools.cache
def _parts_of_the_language(function: Any) -> set[str]:
    """The names of the modules of Triton's language that the function's own module imports."""
    names = {value.__name__ for value in function.__globals__.values() if isinstance(value, ModuleType)}
    return names & {"triton.language", "triton.language.core"}
