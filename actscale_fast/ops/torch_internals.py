"""All that the ops use of PyTorch's private parts. tests/ops/test_torch_internals.py fails when one has changed."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` (all of the call) runs now, untraced, on memory that holds their values.

    Only then may values be read or memory be overwritten. Not so in traces, under modes and function transforms, with
    tensor subclasses and forward-mode derivatives, and for tensors whose values are not those in memory: a conjugate or
    negative view, or a zero that has no memory.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
    ):
        return False
    return all(
        tensor is None
        or (type(tensor) in _PLAIN_TYPES and _dispatch_keys(tensor) in _plain_dispatch_keys(tensor.device.type))
        for tensor in tensors
    )


def _dispatch_keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


@functools.cache
def _plain_dispatch_keys(device: str) -> tuple[int, int]:
    """Those of a plain tensor, outside of and in inference mode."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(_dispatch_keys(torch.empty(0, device=device)))
    return keys[0], keys[1]


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def below_autograd() -> AbstractContextManager[object]:
    """Within it, an op that is called from its own autograd kernel runs on the backend's kernel."""
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]


def graph_is_kept(upstream: Tensor) -> bool:
    """Whether the saved gradient must survive this backward: retain_graph=True, or a trace that is not run yet."""
    return type(upstream) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph()
