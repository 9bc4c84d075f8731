"""How an instruction's operands are read from registers and written to them, in the type that the opcode names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .clusters import Active, pick
from .memory import RAW
from .parse import WIDTHS, Kernel, Literal, Operand
from .races import KernelError

if TYPE_CHECKING:
    from .execute import Threads

Read = Callable[["Threads", Active], NDArray]
Write = Callable[["Threads", Active, NDArray], None]

KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
PACKED = {"bf16x2": "bf16", "f16x2": "f16"}


def dtype_of(kind: str) -> np.dtype:
    """bf16 stands for its bits here; `reader` and `writer` convert."""
    if kind == "pred":
        return np.dtype(np.bool_)
    if kind in ("bf16", *PACKED):
        return np.dtype(RAW[WIDTHS[kind]])
    return np.dtype(f"{KINDS[kind[0]]}{WIDTHS[kind]}")


def widened(bits: NDArray, kind: str) -> NDArray:
    """float32 of the bits of bf16 or f16."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(values: NDArray, kind: str) -> NDArray:
    """The bits of bf16 or f16, rounded to nearest even."""
    values = np.asarray(values, np.float32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def reader(kernel: Kernel, operand: Operand, kind: str) -> Read:
    """A function of the threads: an array of one element per active thread, or a scalar. bf16 is read as float32, and
    a packed pair as two of its elements along a second axis."""
    if kind in ("bf16", *PACKED):
        raw, element = reader(kernel, operand, f"b{8 * WIDTHS[kind]}"), PACKED.get(kind, kind)
        if kind == "bf16":
            return lambda s, active: widened(np.asarray(raw(s, active)), "bf16")
        return lambda s, active: widened(np.atleast_1d(raw(s, active)).view(np.uint16).reshape(-1, 2), element)
    dtype = dtype_of(kind)
    if isinstance(operand, Literal):
        bits = operand.bits % (1 << 8 * dtype.itemsize)
        constant: Any = np.array(bits, RAW[dtype.itemsize]).view(dtype)[()]
        return lambda s, active: constant
    assert isinstance(operand, str), operand
    if operand in kernel.registers:
        held = dtype_of(kernel.registers[operand])
        if held.itemsize == dtype.itemsize:
            key = (operand, dtype)
            return lambda s, active: pick(s.view(key), active)
        own = (operand, held)
        return lambda s, active: pick(s.view(own), active).astype(RAW[dtype.itemsize]).view(dtype)
    if operand.startswith("%"):
        return lambda s, active: special(s, operand, active).astype(dtype)
    for space in (kernel.shared, kernel.parameters):
        if operand in space:
            offset = dtype.type(space[operand].offset)
            return lambda s, active: offset
    if operand in kernel.constants:
        return lambda s, active: dtype.type(s.constants[operand].ctypes.data)
    raise KernelError(f"{operand} is not declared")


def special(s: Threads, name: str, active: Active) -> NDArray:
    if name not in s.clusters.special:
        raise KernelError(f"the special register {name} is not implemented")
    value = np.asarray(s.clusters.special[name])
    return pick(value, active) if value.ndim else value


def writer(kernel: Kernel, operand: Operand, kind: str) -> Write:
    """A wider register takes the sign of a signed type, and zeros of any other."""
    if operand == "_":
        return lambda s, active, values: None
    if kind == "bf16":
        raw = writer(kernel, operand, "b16")
        return lambda s, active, values: raw(s, active, narrowed(values, "bf16"))
    if kind in PACKED:
        raw, element = writer(kernel, operand, "b32"), PACKED[kind]
        return lambda s, active, values: raw(
            s, active, np.ascontiguousarray(narrowed(values, element)).view(np.uint32)[:, 0]
        )
    assert isinstance(operand, str), operand
    if operand not in kernel.registers:
        raise KernelError(f"{operand} is not declared")
    dtype, held = dtype_of(kind), dtype_of(kernel.registers[operand])
    if held.itemsize > dtype.itemsize and dtype.kind == "i":
        dtype = np.dtype(f"i{held.itemsize}")
    key = (operand, dtype if held.itemsize == dtype.itemsize else held)

    def write(s: Threads, active: Active, values: NDArray) -> None:
        s.view(key)[slice(None) if active is None else active] = values

    return write
