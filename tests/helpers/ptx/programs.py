"""Kernels ready to run, the faults that a test puts into them, and how often each was launched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .execute import Launch, Program
from .parse import Kernel

Edit = Callable[[Kernel], Kernel]

#: "triton/scale_heads_fwd_kernel" -> launches of this process.
launches: Counter[str] = Counter()
_programs: dict[tuple[int, Edit | None], tuple[Kernel, Program]] = {}
_edit: tuple[str, Edit] | None = None


@contextlib.contextmanager
def edited(kernel: str, edit: Edit) -> Iterator[None]:
    """Within the `with` block, the kernel of that name, as in `launches`, is run as `edit` leaves it."""
    global _edit
    before, _edit = launches[kernel], (kernel, edit)
    try:
        yield
    finally:
        _edit = None
        assert launches[kernel] > before, f"{kernel} was not launched"


def run(
    backend: str, kernel: Kernel, parameters: bytes, allocations: Iterable[tuple[str, int, int]], launch: Launch
) -> None:
    name = f"{backend}/{kernel.title}"
    edit = _edit[1] if _edit and _edit[0] == name else None
    key = (id(kernel), edit)
    if key not in _programs:  # the kernel is kept with its program, so that the id stays its own
        _programs[key] = (kernel, Program(edit(kernel) if edit else kernel))
    launches[name] += 1
    _programs[key][1](parameters, allocations, launch)


def spans(tensors: Iterable[tuple[str, Any]]) -> list[tuple[str, int, int]]:
    """(name, address, bytes) from each tensor's first element to its last."""
    found = []
    for name, tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            found.append((name, tensor.data_ptr(), (last + 1) * tensor.element_size()))
    return found
