"""The ops as PyTorch sees them: how each is defined, and what hands a call to a backend's module.

`Library.define`/`impl` costs about half of `torch.library.custom_op` a call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .interface import BackendModule

LIBRARY = torch.library.Library("actscale", "DEF")


def define(schema: str, fake: Callable[..., Any] = lambda *arguments: None) -> Any:
    """Defines the op of that schema, computed by the backend that serves its first tensor; returns its overload.

    Args:
        schema: "name(arguments) -> results", as torch.library writes it; the backends' functions are called `name`.
        fake: the results' shapes, dtypes and strides from the arguments'; the default is for ops that return nothing.
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
    """The kernels that serve `x`; the public functions have sent reference calls elsewhere already."""
    name = backends.resolve(x.device, x.dtype)
    if name == "reference":  # the op was called directly, or the backend changed between forward and backward
        name = "cpu" if x.device.type == "cpu" else "triton"
    return _module(name)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys
_plain_keys: set[int] = set()  # the dispatch keys of plain tensors, of every device type that was seen
_seen_devices: set[str] = set()


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` (all of the call) runs now, untraced, on memory that holds their values.

    Then the kernels may be called without PyTorch's dispatcher between; two passes through it cost more than a small
    kernel. The dispatcher is for tracing, modes, tensor subclasses, forward-mode derivatives, and tensors whose values
    are not those in memory: a conjugate or negative view, a zero that has no memory.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or (_dispatch_keys(tensor).raw_repr() not in _plain_keys and not _is_first_plain(tensor))
        ):
            return False
    return True


def _is_first_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is plain and the first of its device type; notes that type's keys, of inference tensors too."""
    device = tensor.device.type
    if device in _seen_devices:
        return False
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain_keys.add(_dispatch_keys(torch.empty(0, device=device)).raw_repr())
    _seen_devices.add(device)
    return _dispatch_keys(tensor).raw_repr() in _plain_keys
