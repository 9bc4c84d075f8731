"""The choice of backend: one name for the process, resolved per tensor.

`auto` picks the C++ kernels for CPU tensors where the extension was built, and a GPU kernel only where its correctness
run on that architecture family has been recorded (`VERIFIED`); otherwise plain PyTorch. A backend asked for by name is
used or refused, never replaced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from .._suggestions import did_you_mean

BackendName = Literal["auto", "cpu", "triton", "cuda", "reference"]

#: (backend, compute-capability major) pairs whose correctness run is recorded in benchmarks/results. None yet.
VERIFIED: frozenset[tuple[str, int]] = frozenset()

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice: str = "auto"


def set_backend(name: BackendName) -> None:
    """Choose the backend of all ops in this process: "auto", "cpu", "triton", "cuda" or "reference".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot run here (extension not built, Triton not installed, no GPU), with the reason.
    """
    global _choice
    if name not in get_args(BackendName):
        names = get_args(BackendName)
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(names)}{did_you_mean(name, names)}")
    reason = unavailable(name)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    _choice = name


def get_backend() -> str:
    """The backend's name as it was set."""
    return _choice


@contextlib.contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = _choice
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)  # type: ignore[arg-type]


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend ("cpu", "triton", "cuda" or "reference") that serves tensors of this device and dtype.

    Raises:
        RuntimeError: a backend asked for by name does not serve them.
    """
    if _choice == "reference":
        return "reference"
    if _choice == "auto":
        if dtype not in KERNEL_DTYPES:
            return "reference"
        if device.type == "cpu":
            return "cpu" if has_extension() else "reference"
        if device.type == "cuda":
            for name in ("cuda", "triton"):
                if VERIFIED and (name, _capability_major(device)) in VERIFIED and not unavailable(name):
                    return name
        return "reference"
    if dtype not in KERNEL_DTYPES:
        raise RuntimeError(f"backend {_choice!r} takes float32, bfloat16 and float16, got {dtype}; use 'reference'")
    served = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}[_choice]
    if device.type not in served and not (_choice == "triton" and device.type == "cpu" and triton_interpreted()):
        raise RuntimeError(f"backend {_choice!r} takes {' or '.join(served)} tensors, got one on {device}")
    return _choice


@functools.cache
def unavailable(name: str) -> str:
    """Why `name` cannot run in this process; "" where it can."""
    if name == "cpu" and not has_extension():
        return f"the C++ extension was not built ({_extension_error()})"
    if name == "cuda":
        if not has_extension():
            return f"the C++ extension was not built ({_extension_error()})"
        kernels = getattr(importlib.import_module("actscale_fast.ops._C"), "cuda", None)
        if kernels is None:
            return "the extension was built without CUDA kernels: no nvcc at install time, or ACTSCALE_BUILD_CUDA=0"
        if not torch.cuda.is_available():
            return "no GPU was found" if torch.version.cuda else "this build of PyTorch has no CUDA"
        reason = kernels.unavailable()
        return f"CUDA says: {reason}" if reason else ""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package 'triton' is not installed"
        if not (torch.cuda.is_available() or triton_interpreted()):
            return (
                "no GPU was found (with TRITON_INTERPRET=1 set before Python starts, its interpreter runs on the CPU)"
            )
    return ""


def triton_interpreted() -> bool:
    """Whether Triton runs in its interpreter, so that its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


def has_extension() -> bool:
    """Whether the compiled extension loads; says once what is slower where it does not."""
    return _extension_loads()


# torch.compile would trace the import, and looks through functools.cache. This is what
# torch.compiler.assume_constant_result sets; calling that imports all of torch._dynamo.
has_extension._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _extension_loads() -> bool:
    error = _extension_error()
    if error:
        warnings.warn(
            f"actscale_fast runs without its C++ extension ({error}): on CPU tensors the loss and the scaling "
            "use plain PyTorch, several times slower. Results are the same.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not error


@functools.cache
def _extension_error() -> str:
    """Why the extension is missing, "" where it imports. One that is there and broken raises its own error."""
    if importlib.util.find_spec("actscale_fast.ops._C") is None:
        return "it was not built: no C++ compiler at install time"
    importlib.import_module("actscale_fast.ops._C")
    return ""


@functools.cache
def _capability_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _initial() -> None:
    name = os.environ.get("ACTSCALE_BACKEND", "auto")
    if name != "auto":
        try:
            set_backend(name)  # type: ignore[arg-type]
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"environment variable ACTSCALE_BACKEND: {error}") from None


_initial()
