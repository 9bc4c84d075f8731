"""Triton kernels compiled for sm_90 without a GPU, and their PTX run on CPU tensors in place of the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton_sources import source_of

from .execute import Launch
from .parse import Kernel, parse
from .programs import run, spans

#: By the source's hash and the options: the kernel, and what Triton's compiler says of it.
_compiled: dict[tuple[str, str], tuple[Kernel, Any]] = {}


def install() -> None:
    """Every launch of this process from now on. To be called before a kernel is defined, with the interpreter off."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    CUDABackend.make_cubin = lambda *_: b""  # half of the compiler's time
    triton.knobs.runtime.interpret = False
    JITFunction.run = launch  # type: ignore[method-assign]


def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **rest: Any) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    if callable(grid):
        grid = grid({**dict(zip(kernel.arg_names, arguments, strict=False)), **rest})
    source, options, passed = source_of(kernel, arguments, rest)
    key = (source.hash(), str(options))
    if key not in _compiled:
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (found,) = parse(result.asm["ptx"]).values()
        _compiled[key] = (found, result.metadata)
    found, metadata = _compiled[key]
    types = [kind for kind in source.signature.values() if kind != "constexpr"]
    packed = bytearray(found.parameter_bytes)  # behind the arguments: scratch memory, which our kernels have none of
    for variable, kind, value in zip(found.parameters.values(), types, passed, strict=False):
        packed[variable.offset : variable.offset + variable.size] = bits_of(kind, value)
    names = [kernel.params[i].name for i in range(len(kernel.params)) if (i,) not in source.constants]
    tensors = [pair for pair in zip(names, passed, strict=True) if isinstance(pair[1], torch.Tensor)]
    shape = (*(int(n) for n in grid), 1)[:2]
    # Where a tile has fewer elements than threads, several warps load what one of them writes back, and drop it: no
    # races in global memory can be told apart from those.
    how = Launch(shape, 32 * metadata.num_warps, 1, metadata.shared, global_races=False)
    run("triton", found, bytes(packed), spans(tensors), how)


def bits_of(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return np.uint64(value.data_ptr()).tobytes()
    return {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[kind](value).tobytes()
