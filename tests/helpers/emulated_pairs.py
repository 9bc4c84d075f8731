"""The level avx512_bf16 of `linear_softmax` on a processor with AVX2: the same source, its one instruction emulated."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from actscale_fast.ops import outputs

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = HERE / "bf16_pairs"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512_BF16 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mavx512bf16")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", f"-I{CSRC}")


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


class EmulatedPairs:
    """The compiled library; called as `ops.cpu.linear_softmax`, for hidden states and W in bfloat16."""

    def __init__(self, folder: Path) -> None:
        library = folder / "emulated_pairs.so"
        sources = [str(SOURCES / name) for name in ("emulated.cpp", "library.cpp")]
        subprocess.run([*compiler(), *FLAGS, *AVX2, "-shared", *sources, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._library.run.argtypes = [
            integer, integer, integer, pointer, integer, pointer, integer, pointer, pointer, pointer, integer,
            ctypes.c_float, integer, pointer, pointer, pointer, pointer, integer,
        ]  # fmt: skip
        self._library.dot.argtypes = [pointer] * 4

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, correct: Tensor | None, wrong: Tensor | None,
        exclude_answers: bool, logit_scale: float, chunk_bytes: int, into: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        made = outputs.linear_softmax(hidden, correct) if into is None else into
        self._library.run(
            hidden.shape[0], weight.shape[0], hidden.shape[1], hidden.data_ptr(), hidden.stride(0), weight.data_ptr(),
            weight.stride(0), *(None if x is None else x.data_ptr() for x in (bias, correct, wrong)),
            exclude_answers, logit_scale, chunk_bytes, *(x.data_ptr() for x in made), torch.get_num_threads(),
        )  # fmt: skip
        return made

    def dot(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total + a0·b0 + a1·b1 for eight float32 sums and eight pairs of bfloat16 on either side, [8] and [8, 2]."""
        out = torch.empty(8)
        self._library.dot(*(x.data_ptr() for x in (total, a, b, out)))
        return out
