"""Changing what a model's attention returns for one forward pass.

Only this file knows how transformers calls attention: through `ALL_ATTENTION_FUNCTIONS`, or `eager_attention_forward`,
in the globals of the file that a model is written in, with the attention module first and [B, T, H, D] as the first
result. Families that compute attention themselves put their values through the KV cache. test_self_check.py fails where
a new version of transformers changes either.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..modules.hooks import Edit

_lock = threading.RLock()  # what is exchanged here is shared by all models of a file
_FUNCTIONS, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


class _Functions:
    """Stands in for transformers' table of attention functions; `changes` apply to the results of its functions."""

    def __init__(self, table: Any, changes: Mapping[nn.Module, Edit]) -> None:
        self._table, self._changes = table, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __getitem__(self, key: str) -> Any:
        return _changed(self._table[key], self._changes)

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def get(self, key: str, default: Any = None) -> Any:
        return _changed(self._table.get(key, default), self._changes)

    def get_interface(self, implementation: str, default: Any) -> Any:
        return _changed(self._table.get_interface(implementation, default), self._changes)


class _Changed:
    """An attention function with changed results."""

    def __init__(self, function: Callable[..., Any], changes: Mapping[nn.Module, Edit]) -> None:
        self.function, self.changes = function, changes

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = self.function(module, *args, **kwargs)
        change = self.changes.get(module)
        if change is None or not isinstance(result, tuple) or not isinstance(result[0], Tensor):
            return result
        return (change(result[0]), *result[1:])


def _changed(function: Any, changes: Mapping[nn.Module, Edit]) -> Any:
    return function if function is None or isinstance(function, _Changed) else _Changed(function, changes)


@contextlib.contextmanager
def heads_changed(changes: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """Change what the attention functions of these modules return, [B, T, H, D]; other models are not affected."""
    with _lock, contextlib.ExitStack() as undo:
        for place in _globals(changes):
            for name in (_FUNCTIONS, _EAGER):
                if name in place:
                    undo.callback(place.__setitem__, name, place[name])
            if _FUNCTIONS in place:
                place[_FUNCTIONS] = _Functions(place[_FUNCTIONS], changes)
            if _EAGER in place:
                place[_EAGER] = _changed(place[_EAGER], changes)
        yield


def _globals(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The globals of the files in which the classes of these modules are written, each once."""
    found: dict[int, dict[str, Any]] = {}
    for cls in {cls for module in modules for cls in type(module).__mro__}:
        forward = cls.__dict__.get("forward")
        place = getattr(inspect.unwrap(forward), "__globals__", {}) if callable(forward) else {}
        if _FUNCTIONS in place or _EAGER in place:
            found[id(place)] = place
    return list(found.values())


def values_changed(change: Callable[[int, Tensor], Tensor], decoder: nn.Module) -> Any:
    """An empty KV cache that returns changed values.

    Args:
        change: takes the number of a layer and its values [B, key-value heads, T, D].
        decoder: its config says what each layer keeps.
    """
    from transformers import DynamicCache

    class Changed(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(key_states, change(layer_idx, value_states), layer_idx, *args, **kwargs)

    config: Any = decoder.config
    return Changed(config=config.get_text_config(decoder=True))
