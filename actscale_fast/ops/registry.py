"""How the ops are defined for PyTorch, and how a call reaches the module of a backend.

A call through `Library.define` and `impl` costs about half as much as one through `torch.library.custom_op`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from . import backends, canary, verdicts
from .interface import BackendModule

LIBRARY = torch.library.Library("actscale", "DEF")

_pin = threading.local()  # a backward pass runs in a thread of autograd's own


def define(schema: str, fake: Callable[..., Any] = lambda *arguments: None) -> Any:
    """Define the op of that schema, computed by the backend that serves its first tensor; return its overload.

    Args:
        schema: "name(arguments) -> results", as torch.library writes it; the backends' functions are called `name`.
        fake: makes results of the right shapes, dtypes and strides; the default is for ops that return nothing.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        LIBRARY.impl(name, functools.partial(run, name), key)
    torch.library.register_fake(f"actscale::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.actscale, name).default


def run(name: str, *arguments: Any, **options: Any) -> Any:
    """Call the function `name` of the backend that serves its first argument, below the dispatcher.

    The first call of a kernel in a process is compared with the reference on a part of its results (see `canary`).
    """
    first = arguments[0]
    if canary.pending:
        canary.collect()
    backend = getattr(_pin, "backend", None) or backends.serving(op_of(name), first)
    if verdicts.distrusted and (first.device.type, first.device.index, op_of(name), first.dtype) in verdicts.distrusted:
        backend = "reference" if backends.get_backend() == "auto" else backend  # also of a forward pass before
    function = getattr(module(backend), name)
    if backend == "reference" or (backend, name, first.dtype, first.device) in canary.passed:
        return function(*arguments, **options)
    return canary.watched(backend, name, op_of(name), function, module("reference"), arguments, options)


@contextlib.contextmanager
def pinned(backend: str) -> Iterator[None]:
    """Within it this thread's calls go to `backend`: a backward pass takes the kernels of its forward pass."""
    before = getattr(_pin, "backend", None)
    _pin.backend = backend
    try:
        yield
    finally:
        _pin.backend = before


@functools.cache
def op_of(name: str) -> str:
    """The op of `verdicts.OPS` that a function of a backend belongs to."""
    return {"intervention_loss_scale_": "intervention_loss"}.get(name, name.removesuffix("_backward"))


@functools.cache
def module(name: str) -> BackendModule:
    """The functions of a backend: "cpu", "triton", "cuda" or "reference"."""
    path = {"cpu": ".cpu", "triton": ".triton", "cuda": ".cuda", "reference": ".reference_backend"}[name]
    return cast(BackendModule, importlib.import_module(path, __package__))
