"""Kernels ready to run, the faults that a test puts into them, and how often each was launched."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .execute import Launch, Program
from .parse import Kernel

Edit = Callable[[Kernel], Kernel]

#: Kernel -> launches of this process.
launches: Counter[str] = Counter()
_programs: dict[tuple[int, Edit | None], tuple[Kernel, Program]] = {}
_edit: tuple[str, Edit] | None = None


def plain_name(name: str) -> str:
    """Of a mangled name, the function's; a Triton kernel has that name already."""
    found = re.search(r"([a-z][a-z_]*_kernel)", name)
    return found[1] if found else name


@contextlib.contextmanager
def edited(kernel: str, edit: Edit) -> Iterator[None]:
    """Within the `with` block, the kernel of that name is run as `edit` leaves it."""
    global _edit
    _edit = (kernel, edit)
    before = launches[kernel]
    try:
        yield
    finally:
        _edit = None
    assert launches[kernel] > before, f"{kernel} was not launched"


def run(kernel: Kernel, parameters: bytes, allocations: Iterable[tuple[str, int, int]], launch: Launch) -> None:
    name = plain_name(kernel.name)
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
