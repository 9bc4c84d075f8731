"""Small questions about a module: its parts, its widths, and what its forward pass takes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from .sharding import own_class


def part(module: nn.Module, path: str) -> nn.Module | None:
    """The part of a module at a dotted path, or None where there is none."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def has(module: nn.Module, path: str) -> bool:
    """Whether a module has a part at this path."""
    return bool(path) and part(module, path) is not None


def submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """`module.get_submodule(path)`, or a ValueError that names the argument."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{name}: {type(module).__name__} has no module {path!r}") from None


def attribute(module: nn.Module, name: str) -> Any:
    """`getattr(module, name, None)` for a number; ten times as fast where there is none.

    A wrapper with a `__getattr__` of its own, which may hand on what is inside it, is asked as usual.
    """
    cls: Any = type(module)
    if name in module.__dict__ or hasattr(cls, name) or cls.__getattr__ is not nn.Module.__getattr__:
        return getattr(module, name, None)
    return None


def positive_int(value: Any) -> int | None:
    """The value where it is a positive int, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def config_value(config: Any, name: str) -> Any:
    """A value of a config; None: it has none, or one per layer without a name for the whole."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' configs of unlike layers raise an error of their own
        return None


def in_features(module: nn.Module) -> int | None:
    """The input width of a linear layer, of GPT-2's Conv1D, or of a wrapper that has the same attributes."""
    width = getattr(module, "in_features", getattr(module, "nx", None))
    return width if isinstance(width, int) else None


def takes_hidden_states(module: nn.Module) -> bool:
    """Whether a module's forward pass begins with hidden states and not with token ids or embeddings."""
    own = module.__dict__.get("forward")
    cls: Any = type(module)
    names = _names(cls.forward) if own is None else frozenset(inspect.signature(own).parameters)
    return "hidden_states" in names and not names & {"input_ids", "inputs_embeds"}


@functools.cache
def _names(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def kind_of(module: nn.Module | None, layer: nn.Module) -> str:
    """The class name of a part of a layer without the beginning that it shares with the layer's: the family's name."""
    return "" if module is None else _without_family(own_class(module).__name__, own_class(layer).__name__)


@functools.cache
def _without_family(name: str, layer_name: str) -> str:
    pairs = enumerate(zip(name, layer_name, strict=False))
    shared = next((place for place, (own, other) in pairs if own != other), len(name))
    while 0 < shared < len(name) and not name[shared].isupper():  # back to the end of a word
        shared -= 1
    return name[shared:]
