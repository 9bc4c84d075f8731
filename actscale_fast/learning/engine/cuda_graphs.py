"""Microbatches as CUDA graphs: one launch instead of some thousands.

One graph is captured per shape; prompts are padded to a few widths, so that there are few shapes. Inputs are copied
into the graph's own memory, and outputs are read from there. Not yet run on a GPU: used only if `capture=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .forward_backward import ForwardBackward, MicrobatchInputs

#: Prompts are padded to a multiple of this, so that few widths occur.
WIDTHS = 8
#: Passes before a capture, in which libraries choose their kernels and allocate their workspaces.
_WARM_UP = 3


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


class CudaGraphs:
    """`ForwardBackward.compute` by replaying graphs; the next microbatch of the same shape overwrites the outputs."""

    def __init__(self, forward_backward: ForwardBackward) -> None:
        self.forward_backward = forward_backward
        self.graphs: dict[Any, _Graph] = {}
        self.pool: Any = None  # memory that all graphs share, because they never run at the same time

    def compute(self, inputs: MicrobatchInputs) -> list[Tensor]:
        """The terms of each request [S, 3] and the gradient of each parameter."""
        given = tensors_of(inputs)
        key = (inputs.shape, tuple(inputs.tensors), tuple((tuple(t.shape), t.dtype, t.device) for t in given))
        found = self.graphs.get(key)
        if found is None:
            found = self.graphs[key] = self._captured(inputs)
        for there, tensor in zip(found.inputs, given, strict=True):
            there.copy_(tensor, non_blocking=True)
        found.graph.replay()
        return found.outputs

    def _captured(self, inputs: MicrobatchInputs) -> _Graph:
        own = with_tensors(inputs, [tensor.clone() for tensor in tensors_of(inputs)])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.forward_backward.compute(own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.forward_backward.compute(own)
        self.pool = self.pool or graph.pool()
        return _Graph(graph, tensors_of(own), outputs)


def check_capturable(model: nn.Module) -> None:
    """Raise a ValueError if the model is not on one GPU."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or not next(iter(devices)).startswith("cuda"):
        raise ValueError(f"capture: got a model on {', '.join(sorted(devices))}, expected one on one GPU")


def tensors_of(inputs: MicrobatchInputs) -> list[Tensor]:
    """All tensors of a microbatch's inputs, in a fixed order."""
    found = list(inputs.tensors.values())

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each_reference(inputs, noted)
    return found


def with_tensors(inputs: MicrobatchInputs, tensors: list[Tensor]) -> MicrobatchInputs:
    """The inputs with other tensors in the order of `tensors_of`."""
    given = iter(tensors)
    named = {name: next(given) for name in inputs.tensors}
    return replace(inputs, tensors=named, references=_each_reference(inputs, lambda _: next(given)))


def _each_reference(
    inputs: MicrobatchInputs, change: Callable[[Tensor], Tensor]
) -> tuple[ops.ReferenceStatistics | Tensor, ...]:
    """The references with each of their tensors changed."""
    return tuple(
        change(reference) if isinstance(reference, Tensor) else reference.each(change)
        for reference in inputs.references
    )
