"""What a model's forward pass takes, and under which names."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from .layout import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def argument_names(decoder: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """The names of what the module's forward takes by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(decoder.forward).parameters.values()
    return tuple(one.name for one in parameters if one.kind in kinds and one.name != "self")


def cache_argument(model: nn.Module) -> str | None:
    """The name under which a model's forward pass takes a KV cache; None: it takes none."""
    return _cache_argument(type(model))  # type: ignore[arg-type]


@functools.cache
def _cache_argument(cls: type[nn.Module]) -> str | None:
    parameters = inspect.signature(cls.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    typed = [name for name, one in parameters.items() if re.search(r"\bCache\b", str(one.annotation))]
    return typed[0] if len(typed) == 1 else None


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """The names of the arguments of a model's forward pass; wrappers hand theirs on."""
    return _accepted(type(unwrap(model)))  # type: ignore[arg-type]


@functools.cache
def _accepted(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)
