"""The choice of backend: one name for the process, resolved per tensor.

`auto` picks, per op and dtype, what passed verification on this very device and is fastest there (see `verdicts`).
Without a verdict CPU tensors are served by the C++ kernels where the extension was built, and tensors on a GPU by plain
PyTorch. A backend asked for by name is used or refused, never replaced.
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
from torch import Tensor

from .._log import notice
from .._suggestions import did_you_mean
from . import verdicts

BackendName = Literal["auto", "cpu", "triton", "cuda", "reference"]

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


def serving(op: str, x: Tensor, *, large: bool = False) -> str:
    """The backend ("cpu", "triton", "cuda" or "reference") that serves a call of `op` whose first argument is `x`.

    `large`: that of large calls, whatever the size of `x`.

    Raises:
        RuntimeError: a backend asked for by name does not serve tensors of this device and dtype.
    """
    if _choice != "auto":
        return resolve(x.device, x.dtype)
    # The statistics of a reference and the losses that use them, over other numbers of rows, must take one backend.
    # In a trace the number of elements may be a symbol, and a comparison would tie the graph to it.
    size = (
        verdicts.LARGE
        if large or op == "linear_softmax" or torch.compiler.is_compiling()
        else verdicts.size_class(x.numel())
    )
    return _of_auto(x.device, x.dtype, op, size)


def resolve(device: torch.device, dtype: torch.dtype, op: str = "scale_heads", size: int = verdicts.LARGE) -> str:
    """As `serving`, for any tensor of this device and dtype; `size`: an index into `verdicts.SIZES`."""
    if _choice == "reference":
        return "reference"
    if _choice == "auto":
        return _of_auto(device, dtype, op, size)
    if dtype not in KERNEL_DTYPES:
        raise RuntimeError(f"backend {_choice!r} takes float32, bfloat16 and float16, got {dtype}; use 'reference'")
    served = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}[_choice]
    if device.type not in served and not (_choice == "triton" and device.type == "cpu" and triton_interpreted()):
        raise RuntimeError(f"backend {_choice!r} takes {' or '.join(served)} tensors, got one on {device}")
    return _choice


def _of_auto(device: torch.device, dtype: torch.dtype, op: str, size: int) -> str:
    if dtype not in KERNEL_DTYPES or device.type not in ("cpu", "cuda"):
        return "reference"
    return automatic(device.type, device.index, dtype, op, size)


def automatic(device_type: str, index: int | None, dtype: torch.dtype, op: str, size: int) -> str:
    """What `auto` takes for a call of that size class."""
    key = (device_type, index, dtype, op)
    found = _automatic.get(key)
    if found is None:
        found = _automatic[key] = _look_up(device_type, index, dtype, op)
    return found[size]


# Within a process only `reconsider` changes its results; torch.compile takes them as constants.
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]

_automatic: dict[tuple[str, int | None, torch.dtype, str], tuple[str, str, str]] = {}
_REFERENCE = ("reference", "reference", "reference")


def _look_up(device_type: str, index: int | None, dtype: torch.dtype, op: str) -> tuple[str, str, str]:
    """By size class (`verdicts.SIZES`)."""
    if (device_type, index, op, dtype) in verdicts.distrusted:
        return _REFERENCE
    table = verdicts.choices(device_type, index)
    if table is None:
        if device_type == "cpu" and has_extension():
            return ("cpu", "cpu", "cpu")
        if device_type == "cuda":
            _say_unverified(index)
        return _REFERENCE
    choice = table.get((op, dtype))
    if choice is None:
        return _REFERENCE
    small, medium, large = (
        name if name == "reference" or not unavailable_on(name, device_type, index) else "reference"
        for name in choice.fastest
    )
    return small, medium, large


def reconsider() -> None:
    """Read the verdicts anew: after a verification, or when a kernel has failed its canary."""
    verdicts.forget()
    _automatic.clear()


@functools.cache
def _say_unverified(index: int | None) -> None:
    if not (unavailable("triton") and unavailable("cuda")):
        device = "cuda" if index is None else f"cuda:{index}"
        notice(
            f"the kernels of actscale_fast have not been verified on {device}, so its ops run as plain PyTorch there, "
            f"several times slower; to verify them (a minute or two, once): actscale-fast verify --device {device}"
        )


@functools.cache
def unavailable(name: str) -> str:
    """Why `name` cannot run in this process; "" where it can."""
    if name == "cpu" and not has_extension():
        return f"the C++ extension was not built ({_extension_error()})"
    if name == "cuda":
        if not has_extension():
            return f"the C++ extension was not built ({_extension_error()})"
        extension = importlib.import_module("actscale_fast.ops._C")
        kernels = getattr(extension, "cuda", None)
        if kernels is None:
            return f"the extension was built without CUDA kernels: {extension.build_record()['no_cuda']}"
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


@functools.cache
def unavailable_on(name: str, device_type: str, index: int | None) -> str:
    """As `unavailable`, for one of several GPUs: the CUDA kernels may have code for some of them."""
    reason = unavailable(name)
    if reason or name != "cuda" or device_type != "cuda":
        return reason
    kernels = importlib.import_module("actscale_fast.ops._C").cuda
    return str(kernels.unavailable_on(torch.cuda.current_device() if index is None else index))


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


def _initial() -> None:
    name = os.environ.get("ACTSCALE_BACKEND", "auto")
    if name != "auto":
        try:
            set_backend(name)  # type: ignore[arg-type]
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"environment variable ACTSCALE_BACKEND: {error}") from None


_initial()
