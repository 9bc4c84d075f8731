"""How the ops are defined for PyTorch, and how a call reaches the module of a backend.

A call through `Library.define` and `impl` costs about half as much as one through `torch.library.custom_op`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import backends
from .interface import BackendModule

LIBRARY = torch.library.Library("actscale", "DEF")


def define(schema: str, fake: Callable[..., Any] = lambda *arguments: None) -> Any:
    """Define the op of that schema, computed by the backend that serves its first tensor; return its overload.

    Args:
        schema: "name(arguments) -> results", as torch.library writes it; the backends' functions are called `name`.
        fake: makes results of the right shapes, dtypes and strides; the default is for ops that return nothing.
    """
    name = schema[: schema.index("(")]

    def call(*arguments: Any) -> Any:
        return getattr(backend_of(arguments[0]), name)(*arguments)

    LIBRARY.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        LIBRARY.impl(name, call, key)
    torch.library.register_fake(f"actscale::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.actscale, name).default


@functools.cache
def _module(name: str) -> BackendModule:
    path = {"cpu": ".cpu", "triton": ".triton", "cuda": ".cuda"}[name]
    return cast(BackendModule, importlib.import_module(path, __package__))


def backend_of(x: Tensor) -> BackendModule:
    """The kernels that serve `x`. Calls for the reference backend are handled before this point."""
    name = backends.resolve(x.device, x.dtype)
    if name == "reference":  # the op was called directly, or the backend changed between forward and backward
        name = "cpu" if x.device.type == "cpu" else "triton"
    return _module(name)
