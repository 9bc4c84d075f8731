"""What a case of verification declares, and the inputs that cases are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import backends
from .guarded_memory import Guard

#: The arguments of a case: tensors, None and plain values.
Arguments = tuple[Any, ...]
#: The public op with its gradients: takes a case's arguments, returns its results.
Call = Callable[..., tuple[Tensor, ...]]
#: For each result, from the arguments in float64, the size of the terms that it is the sum of.
Terms = Callable[..., tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """One input of one op in one dtype.

    Args:
        name: what is special about it.
        call: the op with its gradients.
        arguments: on the CPU; every run gets a copy of its own, in guarded memory on the device.
        terms: None: 0 for every result.
        offset: elements between an aligned address and the beginning of each tensor.
        refused_row: the arguments are invalid in this row: an error on a CPU; on a GPU its results are NaN, and the
            other rows' are those of `valid`.
        valid: the arguments without the invalid value.
    """

    name: str
    call: Call
    arguments: Arguments
    terms: Terms | None = None
    offset: int = 0
    refused_row: int | None = None
    valid: Arguments = ()

    def on(self, device: torch.device, guard: Guard, *, valid: bool = False) -> Arguments:
        """The arguments on the device, between guard bands, with their strides; nothing is moved by the call itself."""

        def placed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: placed(item) for key, item in value.items()}
            return guard.place(_moved(value, device), self.offset) if isinstance(value, Tensor) else value

        return tuple(map(placed, self.valid if valid else self.arguments))

    def exact(self) -> tuple[Tensor, ...]:
        """The results in float64, by the reference."""
        with backends.use_backend("reference"):
            return self.call(*self.wide())

    def wide(self) -> Arguments:
        """The arguments in float64."""
        return tuple(
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in self.arguments
        )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device with the same strides."""
    if x.device == device:
        return x
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    if not x.numel():
        return x.to(device)
    return x.as_strided((extent,), (1,), x.storage_offset()).to(device).as_strided(x.shape, x.stride())


class Inputs:
    """Random inputs from one seed, made on the CPU and therefore equal on every device."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def activations(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in the case's dtype."""
        return self.normal(*shape, scale=scale).to(self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in float32."""
        return torch.randn(*shape, generator=self._generator) * scale

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below `high`."""
        return torch.randint(high, shape, generator=self._generator)
