"""What a case declares: its settings, and for each the inputs, the least bytes and operations, and the variants."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from actscale_fast.ops import backends

Call = Callable[[], tuple[Tensor, ...]]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Args:
        name: what the table calls it; "eager" and "torch.compile" are what the ratios are taken to.
        call: does the whole work once and returns its results in the order of `Problem.exact`.
        backend: the backend of `actscale_fast.ops` that is chosen while it runs.
        checked: False for a yardstick that is not the same work, such as bare matrix products.
    """

    name: str
    call: Call
    backend: str | None = None
    checked: bool = True


@dataclass(frozen=True)
class Problem:
    """The inputs of one setting on one device, closed over by the variants.

    Args:
        variants: the first one is the baseline; the errors of those called "eager…" bound those of the others.
        exact: the results in float64.
        n_bytes: what any implementation must read and write, each once.
        flops: the operations of the formula, an exp counted as one.
        terms: for each result the size of the terms whose sum or difference it is (Σ of magnitudes, float64), 0 where
            it is none: adding them in another order moves the result by a rounding at that size.
        dtype: what those terms are computed in; that of the model where they come out of one.
        resources: what the variants hold open; closed once the setting is done.
    """

    variants: list[Variant]
    exact: Call
    n_bytes: int
    flops: int
    terms: Callable[[], tuple[float, ...]] | None = None
    dtype: torch.dtype = torch.float32
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(frozen=True)
class Setting:
    """A line group of the table: a label, a function that makes its inputs, and what the reader should know."""

    label: str
    make: Callable[[torch.device], Problem]
    note: str = ""
    quick: bool = False  # also run by --quick
    devices: tuple[str, ...] = ("cpu", "cuda")  # the types of device it is run on


@dataclass(frozen=True)
class Case:
    """One file under benchmarks/cases."""

    name: str
    title: str
    settings: list[Setting] = field(default_factory=list)
    unit: str = "ms"  # of the times in the table: "ms", "us" or "s"
    bandwidth: bool = True  # whether GB/s and the share of the copy bandwidth say anything about it
    counted: bool = False  # whether the table has the kernels of a call and the bytes that they move
    clocks: tuple[str, ...] = ("device", "call", "step")  # on a GPU; ratios are taken from the first
    fewest_samples: int | None = None  # of a variant whose call takes seconds; None: as of all others


def kernel_backends(device: torch.device) -> Iterator[str]:
    """The compiled backends that can run on this device; Triton's interpreter is none."""
    for name in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        if not backends.unavailable(name):
            yield name


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compile(function)` for fixed shapes."""
    return torch.compile(function, dynamic=False)


#: Devices of a setting that is too large for a CPU.
GPU_ONLY = ("cuda",)
#: Different rows of a large input, at most; more of them are these over and over, at addresses of their own.
DISTINCT_ROWS = 512


def repeated(rows: Tensor, count: int) -> Tensor:
    """`count` rows: those of `rows`, over and over."""
    return rows.repeat(-(-count // len(rows)), 1)[:count]


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, width: int, elements: int = 1 << 27
) -> tuple[Tensor, ...]:
    """`function` of some rows of all tensors at a time, its results (a tuple of [rows, ...]) joined.

    For what float64 would not leave memory for; `width` elements of it come with a row.
    """
    step = max(1, elements // width)
    parts = [function(*some) for some in zip(*(tensor.split(step) for tensor in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def generator(seed: int = 0) -> Callable[..., Tensor]:
    """A seeded `randn` that takes `scale`; tensors are made on the CPU, equal on every machine."""
    return functools.partial(_normal, torch.Generator().manual_seed(seed))


def _normal(source: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=source) * scale
