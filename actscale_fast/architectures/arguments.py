"""The arguments of a model's forward pass and their names."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from .hugging_face import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def argument_names(module: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """The names of the arguments that a module's forward takes by position, in order."""
    own = isinstance(module, nn.Module) and "forward" in module.__dict__
    cls: Any = module if own or isinstance(module, type) else type(module)
    return _positional.__wrapped__(cls.forward) if own else _positional(cls.forward)


# By the function and not by its class, whose forward another library may replace.
@functools.cache
def _positional(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind in kinds and one.name != "self")


def cache_argument(model: nn.Module) -> str | None:
    """The name under which a model's forward pass takes a KV cache; None: it takes none."""
    cls: Any = type(model)
    return _cache_argument(cls.forward)


@functools.cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    typed = [name for name, one in parameters.items() if re.search(r"\bCache\b", str(one.annotation))]
    return typed[0] if len(typed) == 1 else None


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """The names of all arguments of a model's forward pass, without its wrappers."""
    cls: Any = type(unwrap(model))
    return _all_names(cls.forward)


@functools.cache
def _all_names(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
