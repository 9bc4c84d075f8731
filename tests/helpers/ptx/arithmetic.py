"""Instructions that compute registers from registers, each a function of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .clusters import Active
from .memory import RAW, SHARED_WINDOW
from .operands import PACKED, dtype_of, reader, writer
from .parse import WIDTHS, Instruction, Kernel
from .races import KernelError

Run = Callable[[Any, Active], None]
SMALLEST_NORMAL = np.float32(2.0**-126)
#: Parts of an opcode that change nothing here: the rounding to nearest that NumPy has, and approximations, which are
#: computed as exactly as float32 can hold them.
IGNORED = {"rn", "approx", "full", "uni", "sync", "aligned", "lo", "wide", "hi", "ftz", "NaN"}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind in ("bf16", *PACKED)


def flushed(values: NDArray) -> NDArray:
    """Denormal float32 as zeros of their sign."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def quotient(x: NDArray, y: NDArray) -> NDArray:
    """Towards zero."""
    if (np.asarray(y) == 0).any():
        raise KernelError("an integer is divided by 0")
    down = x // y
    return down + ((x - down * y != 0) & ((x < 0) != (y < 0))).astype(down.dtype)


def divide(x: NDArray, y: NDArray) -> NDArray:
    return x / y if x.dtype.kind == "f" else quotient(x, y)


def shift_left(x: NDArray, by: NDArray) -> NDArray:
    bits = 8 * x.dtype.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: NDArray, by: NDArray) -> NDArray:
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def fused(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    """x·y + z, rounded once: the product of two float32 is exact as float64."""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y + z).astype(x.dtype)


def half_precise_reciprocal(x: NDArray) -> NDArray:
    """rcp.approx.ftz.f64 has the upper half of its result's bits."""
    return ((1 / x).view(np.uint64) >> np.uint64(32) << np.uint64(32)).view(np.float64)


def field_of(x: NDArray, start: NDArray, length: NDArray) -> NDArray:
    """bfe: `length` bits from `start` on, with the sign of a signed type."""
    start, length = np.minimum(start & 255, 32).astype(np.int64), np.minimum(length & 255, 32).astype(np.int64)
    field = (x.astype(np.int64) >> start) & ((1 << length) - 1)
    if x.dtype.kind == "i":
        field = np.where(field >> np.maximum(length - 1, 0) & 1, field - (1 << length), field)
    return field.astype(x.dtype)


def permuted(x: NDArray, y: NDArray, selector: NDArray) -> NDArray:
    """prmt: each byte one of the eight of x and y."""
    pool = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(pool, selector).shape, np.uint64)
    for k in range(4):
        chosen = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (pool >> (8 * (chosen & 7)).astype(np.uint64)) & np.uint64(255)
        byte = np.where(chosen & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out |= byte << np.uint64(8 * k)
    return out.astype(np.uint32)


UNARY: dict[str, Callable[[NDArray], NDArray]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt,
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(x.dtype),
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(x.dtype),
    "rcp": lambda x: half_precise_reciprocal(x) if x.dtype == np.float64 else 1 / x,
}  # fmt: skip
BINARY: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "div": divide, "rem": lambda x, y: x - quotient(x, y) * y, "shl": shift_left, "shr": shift_right,
}  # fmt: skip


def simple(kernel: Kernel, i: Instruction, run: Callable[..., NDArray], kinds: tuple[str, ...], result: str) -> Run:
    """destination = run(sources of `kinds`)."""
    if not set(i.opcode[1:-1]) <= IGNORED:
        raise KernelError("an instruction that is not implemented")
    reads = [reader(kernel, operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=True)]
    write = writer(kernel, i.operands[0], result)
    if "ftz" in i.opcode:
        return lambda s, active: write(s, active, flushed(run(*(flushed(read(s, active)) for read in reads))))
    if len(reads) == 2:
        first, second = reads
        return lambda s, active: write(s, active, run(first(s, active), second(s, active)))
    return lambda s, active: write(s, active, run(*(read(s, active) for read in reads)))


def product(kernel: Kernel, i: Instruction) -> Run:
    """mul, mad and fma."""
    kind, adds = i.type, len(i.operands) == 4
    if is_float(kind):
        return simple(kernel, i, fused if adds else np.multiply, (kind,) * (3 if adds else 2), kind)
    bits, wide = 8 * WIDTHS[kind], f"{kind[0]}{16 * WIDTHS[kind]}"
    to = dtype_of(wide if WIDTHS[kind] < 8 else kind)
    result = wide if "wide" in i.opcode else kind
    if "hi" in i.opcode and WIDTHS[kind] == 8:
        raise KernelError("an instruction that is not implemented")

    def run(x: NDArray, y: NDArray, *z: NDArray) -> NDArray:
        full: NDArray
        if "lo" in i.opcode:
            full = x * y
        else:
            full = x.astype(to) * y.astype(to)
            full = full if "wide" in i.opcode else (full >> to.type(bits)).astype(x.dtype)
        return full + z[0] if z else full

    return simple(kernel, i, run, (kind, kind, result)[: 3 if adds else 2], result)


def comparison(kernel: Kernel, i: Instruction) -> Run:
    name, kind = i.opcode[1], i.type
    if len(i.operands) != 3 or not set(i.opcode[2:-1]) <= {"ftz"}:
        raise KernelError("an instruction that is not implemented")
    x_of, y_of = reader(kernel, i.operands[1], kind), reader(kernel, i.operands[2], kind)
    write = writer(kernel, i.operands[0], "pred")
    if is_float(kind):
        unordered = name in ("nan", "equ", "neu", "ltu", "leu", "gtu", "geu")
        compare = COMPARISONS.get(name[:-1] if unordered else name)

        def run(s: Any, active: Active) -> None:
            x, y = x_of(s, active), y_of(s, active)
            nan = np.isnan(x) | np.isnan(y)
            ordered = compare(x, y) if compare else name == "num"
            write(s, active, ordered | nan if unordered else ordered & ~nan)

        return run
    plain = COMPARISONS[name]
    return lambda s, active: write(s, active, plain(x_of(s, active), y_of(s, active)))


def conversion(kernel: Kernel, i: Instruction) -> Run:
    modifiers, to, kind = set(i.opcode[1:-2]), i.opcode[-2], i.type
    if not modifiers <= {"rn", "rna", "rni", "rzi", "rmi", "rpi", "ftz"}:
        raise KernelError("an instruction that is not implemented")
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((whole[m] for m in modifiers if m in whole), None)
    write = writer(kernel, i.operands[0], to)
    if to in PACKED:
        high, low = (reader(kernel, operand, kind) for operand in i.operands[1:])
        return lambda s, active: write(
            s, active, np.stack(np.broadcast_arrays(low(s, active), high(s, active)), -1).reshape(-1, 2)
        )
    read = reader(kernel, i.operands[1], kind)

    def run(s: Any, active: Active) -> None:
        x = read(s, active)
        if "ftz" in modifiers and x.dtype == np.float32:
            x = flushed(x)
        if rounding is not None:
            x = rounding(x)
        if to == "bf16":
            write(s, active, x)
        elif is_float(kind) and not is_float(to):
            write(s, active, saturated(x, dtype_of(to)))
        else:
            write(s, active, x.astype(dtype_of(to)))

    return run


def saturated(x: NDArray, to: np.dtype) -> NDArray:
    """Whole floats as integers: NaN is 0, and what is too large is the largest."""
    limits = np.iinfo(to)
    inside = np.nan_to_num(x.astype(np.longdouble), nan=0.0, posinf=float(limits.max), neginf=float(limits.min))
    return np.clip(inside, limits.min, limits.max).astype(to)


def move(kernel: Kernel, i: Instruction) -> Run:
    """mov, and its forms that split a register or join several."""
    kind, target, source = i.type, i.operands[0], i.operands[1]
    if not isinstance(target, tuple) and not isinstance(source, tuple):
        read, write = reader(kernel, source, kind), writer(kernel, target, kind)
        return lambda s, active: write(s, active, read(s, active))
    pieces = target if isinstance(target, tuple) else source
    assert isinstance(pieces, tuple)
    width = WIDTHS[kind] // len(pieces)
    if isinstance(target, tuple):
        read = reader(kernel, source, kind)
        writes = [writer(kernel, piece, f"b{8 * width}") for piece in pieces]

        def split(s: Any, active: Active) -> None:
            parts = np.atleast_1d(read(s, active).copy()).view(RAW[width]).reshape(-1, len(pieces))
            for k, write in enumerate(writes):
                write(s, active, parts[:, k])

        return split
    reads = [reader(kernel, piece, f"b{8 * width}") for piece in pieces]
    write = writer(kernel, target, kind)

    def join(s: Any, active: Active) -> None:
        parts = np.stack(np.broadcast_arrays(*(read(s, active) for read in reads)), -1)
        write(s, active, np.atleast_2d(np.ascontiguousarray(parts)).view(dtype_of(kind))[:, 0])

    return join


def select(kernel: Kernel, i: Instruction) -> Run:
    def chosen(x: NDArray, y: NDArray, where: NDArray) -> NDArray:
        return np.asarray(np.where(where, x, y))

    return simple(kernel, i, chosen, (i.type, i.type, "pred"), i.type)


def convert_address(kernel: Kernel, i: Instruction) -> Run:
    """cvta: generic addresses are global ones outside of the window of shared memory, parameters' are offsets."""
    read, write = reader(kernel, i.operands[1], i.type), writer(kernel, i.operands[0], i.type)
    if not any(part.startswith("shared") for part in i.opcode):
        return lambda s, active: write(s, active, read(s, active))

    def run(s: Any, active: Active) -> None:
        addresses = np.broadcast_to(read(s, active).astype(np.int64), s.count(active))
        if "to" not in i.opcode:
            addresses = s.clusters.named_by(addresses, s.ranks(active))
        else:
            addresses = addresses - SHARED_WINDOW
        write(s, active, addresses.astype(np.uint64))

    return run


def map_address(kernel: Kernel, i: Instruction) -> Run:
    """mapa: the same place in another block's shared memory."""
    addresses, rank = reader(kernel, i.operands[1], i.type), reader(kernel, i.operands[2], "u32")
    write = writer(kernel, i.operands[0], i.type)

    def run(s: Any, active: Active) -> None:
        named = s.clusters.named_by(*(np.asarray(r(s, active)).astype(np.int64) for r in (addresses, rank)))
        write(s, active, (named if WIDTHS[i.type] == 8 else named - SHARED_WINDOW).astype(dtype_of(i.type)))

    return run


def arithmetic(kernel: Kernel, i: Instruction) -> Run | None:
    """None where the instruction is of another kind."""
    kind = i.type
    special: dict[str, Callable[[Kernel, Instruction], Run]] = {
        "mov": move, "selp": select, "setp": comparison, "cvt": conversion, "cvta": convert_address,
        "mapa": map_address, "mul": product,
        "mad": product, "fma": product,
    }  # fmt: skip
    if i.name in special:
        return special[i.name](kernel, i)
    if i.name in UNARY:
        return simple(kernel, i, UNARY[i.name], (kind,), kind)
    if i.name in ("shl", "shr"):
        return simple(kernel, i, BINARY[i.name], (kind, "u32"), kind)
    if i.name in BINARY:
        return simple(kernel, i, BINARY[i.name], (kind, kind), kind)
    if i.name in ("min", "max"):
        whole, number = (np.minimum, np.fmin) if i.name == "min" else (np.maximum, np.fmax)
        return simple(kernel, i, number if is_float(kind) and "NaN" not in i.opcode else whole, (kind, kind), kind)
    if i.name == "bfe":
        return simple(kernel, i, field_of, (kind, "u32", "u32"), kind)
    if i.name == "prmt":
        return simple(kernel, i, permuted, ("b32", "b32", "b32"), "b32")
    return None
