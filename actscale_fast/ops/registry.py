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
from torch._C import _functions
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


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a Function's backward: gradients that are differentiated again (a gradient penalty) raise.

    `torch.autograd.function.once_differentiable` does so only where the upstream requires a gradient, and that of a
    loss is a constant 1: the penalty's part would be missing without a word.

    Args:
        op: the name in the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: Any) -> Any:
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            # Grad mode is on under create_graph=True; a compiler traces backward passes with it on, and refuses a
            # second derivative itself.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return gradients
            # It lies above the forward's leaves, so that torch.autograd.grad by one of them passes it too.
            inputs = [None if g is None else g.detach().requires_grad_() for g in gradients]
            inputs += [*upstream, *_leaves_below(ctx)]
            message = f"{op}: its gradient (create_graph=True) was differentiated, but the op is once differentiable"
            refuse: Any = _functions.DelayedError(message.encode(), len(inputs))
            return refuse(*inputs)[: len(gradients)]

        return wrapper

    return decorate


def _leaves_below(node: Any) -> list[Tensor]:
    """The tensors whose gradients a backward pass through `node` accumulates."""
    seen, waiting, leaves = {node}, [node], []
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is None or below in seen:
                continue
            seen.add(below)
            waiting.append(below)
            if isinstance(below, _functions.AccumulateGrad):  # type: ignore[attr-defined]
                leaves.append(below.variable)
    return leaves


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
