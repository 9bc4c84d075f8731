"""Microbatches as CUDA graphs: one launch instead of some thousands.

One graph is captured per shape; prompts are padded to a few widths, so that there are few shapes. Inputs are copied
into the graph's own memory, and outputs are read from there. Not yet run on a GPU: used only if `capture` is True, or
"auto" and the first passes agree with those that are not captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...architectures.hugging_face import unwrap
from ...architectures.sharding import is_sharded
from ...ops import canary
from .forward_backward import ForwardBackward, MicrobatchInputs

#: Prompts are padded to a multiple of this, so that few widths occur.
WIDTHS = 8
#: Passes before a capture, in which libraries choose their kernels and allocate their workspaces.
_WARM_UP = 3
#: Passes that are compared with plain ones, and the difference allowed, relative to the largest value.
_PROBED, _CLOSE = 3, 1e-3


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
        given, key = tensors_of(inputs), shape_of(inputs)
        found = self.graphs.get(key)
        if found is None:
            found = self.graphs[key] = self._captured(inputs)
        for there, tensor in zip(found.inputs, given, strict=True):
            there.copy_(tensor, non_blocking=True)
        found.graph.replay()
        return found.outputs

    def _captured(self, inputs: MicrobatchInputs) -> _Graph:
        with torch.cuda.device(tensors_of(inputs)[0].device):  # streams and captures belong to the current device
            return self._captured_on_device(inputs)

    def _captured_on_device(self, inputs: MicrobatchInputs) -> _Graph:
        own = with_tensors(inputs, [tensor.clone() for tensor in tensors_of(inputs)])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.forward_backward.compute(own)
        torch.cuda.current_stream().wait_stream(stream)
        canary.collect(wait=True)  # a kernel that failed must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.forward_backward.compute(own)
        self.pool = self.pool or graph.pool()
        return _Graph(graph, tensors_of(own), outputs)


class ProbedGraphs:
    """Graphs for `capture="auto"`: used once the first passes agree with plain ones, given up with a warning if not."""

    def __init__(self, forward_backward: ForwardBackward, graphs: CudaGraphs | None = None) -> None:
        self.forward_backward = forward_backward
        self.graphs = graphs or CudaGraphs(forward_backward)
        self.agreed: dict[Any, int] = {}  # passes of each shape
        self.given_up = False

    def compute(self, inputs: MicrobatchInputs) -> list[Tensor]:
        """As `CudaGraphs.compute`."""
        if self.given_up:
            return self.forward_backward.compute(inputs)
        shape = shape_of(inputs)
        if self.agreed.get(shape, 0) >= (1 if sum(self.agreed.values()) >= _PROBED else _PROBED):
            return self.graphs.compute(inputs)
        expected = [tensor.clone() for tensor in self.forward_backward.compute(inputs)]
        try:
            captured = self.graphs.compute(inputs)
        except torch.OutOfMemoryError:  # the engine halves its passes
            raise
        except RuntimeError as error:
            self._give_up(str(error))
            return expected
        if all(_agree(one, other) for one, other in zip(captured, expected, strict=True)):
            self.agreed[shape] = self.agreed.get(shape, 0) + 1
        else:
            self._give_up("a captured pass gives other results")
        return expected

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self.graphs.graphs.clear()
        self.graphs.pool = None
        text = " ".join(reason.split())[:200]
        warnings.warn(f"capture='auto': passes are not captured as CUDA graphs ({text})", RuntimeWarning, stacklevel=4)


def _agree(captured: Tensor, plain: Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    size = plain.abs().max() if plain.numel() else plain.new_zeros(())
    return bool(((captured - plain).abs() <= _CLOSE * size).all())


def is_capturable(model: nn.Module) -> bool:
    """Whether the whole model is on one GPU, and held by this process alone."""
    devices = _devices(model)
    return len(devices) == 1 and devices[0].startswith("cuda") and not is_sharded(unwrap(model))


def check_capturable(model: nn.Module) -> None:
    """Raise a ValueError if the model is not on one GPU, or held by several processes."""
    if is_sharded(unwrap(model)):
        raise ValueError("capture: got a model that is sharded over processes, whose exchanges are not captured")
    if not is_capturable(model):
        raise ValueError(f"capture: got a model on {', '.join(_devices(model))}, expected one on one GPU")


def _devices(model: nn.Module) -> list[str]:
    return sorted({str(parameter.device) for parameter in model.parameters()})


def shape_of(inputs: MicrobatchInputs) -> Any:
    """What a graph is captured for: the shapes, dtypes and devices of all tensors."""
    given = ((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors_of(inputs))
    return inputs.shape, tuple(inputs.tensors), tuple(given)


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
