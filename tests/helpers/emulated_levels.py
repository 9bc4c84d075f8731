"""The levels avx512_bf16 and avx512_amx of `linear_softmax` on a processor with AVX2: the same sources, their
instructions emulated."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from actscale_fast.ops import outputs
from actscale_fast.ops.calls import TYPES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = HERE / "emulated_level_sources"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512_BF16 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mavx512bf16")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-Wno-psabi",
    f"-I{CSRC}",
)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def knows(*flags: str) -> bool:
    """Whether there is a compiler here that takes these options."""
    command = [*compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return not subprocess.run(command, capture_output=True).returncode
    except OSError:
        return False


def gcc_version() -> str:
    """The version of the compiler if it is GCC, such as "12.2.0"; otherwise ""."""
    try:  # other compilers do not know this option
        return subprocess.run([*compiler(), "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Library:
    """The compiled levels."""

    def __init__(self, folder: Path) -> None:
        library = folder / "emulated_levels.so"
        sources = [str(SOURCES / name) for name in ("pairs.cpp", "tiles.cpp", "library.cpp")]
        subprocess.run([*compiler(), *FLAGS, *AVX2, "-shared", *sources, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self.run = self._library.run
        self.run.argtypes = [
            integer, integer, integer, integer, integer, pointer, integer, pointer, integer, pointer, pointer, pointer,
            integer, ctypes.c_float, integer, pointer, pointer, pointer, pointer, integer,
        ]  # fmt: skip
        self._library.dot.argtypes = self._library.multiply_tiles.argtypes = [pointer] * 4

    def dot(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total + a0·b0 + a1·b1 for eight float32 sums and eight pairs of bfloat16 on either side, [8] and [8, 2]."""
        out = torch.empty(8)
        self._library.dot(*(x.data_ptr() for x in (total, a, b, out)))
        return out

    def multiply_tiles(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total + A·B for float32 sums [16, 16], A [16, 32] and B [16, 16, 2] in bfloat16: B[k, n] is a pair of k."""
        out = torch.empty(16, 16)
        self._library.multiply_tiles(*(x.data_ptr() for x in (total, a, b, out)))
        return out


class EmulatedLevel:
    """One of the levels; called as `ops.cpu.linear_softmax`, with hidden states and W of a type that it takes.

    Args:
        library: the compiled levels.
        tiles: the level avx512_amx, not avx512_bf16.
    """

    def __init__(self, library: Library, *, tiles: bool) -> None:
        self.library, self.tiles = library, tiles

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, correct: Tensor | None, wrong: Tensor | None,
        exclude_answers: bool, logit_scale: float, chunk_bytes: int, into: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        made = outputs.linear_softmax(hidden, correct) if into is None else into
        self.library.run(
            self.tiles, TYPES[hidden.dtype], hidden.shape[0], weight.shape[0], hidden.shape[1], hidden.data_ptr(),
            hidden.stride(0), weight.data_ptr(), weight.stride(0),
            *(None if x is None else x.data_ptr() for x in (bias, correct, wrong)), exclude_answers, logit_scale,
            chunk_bytes, *(x.data_ptr() for x in made), torch.get_num_threads(),
        )  # fmt: skip
        return made
