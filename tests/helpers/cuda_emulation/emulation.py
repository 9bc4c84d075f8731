"""The CUDA kernels on an emulated device: compiled with a C++ compiler, as a module for Python or in a program.

The module is what `ops/cuda` calls of the extension, bindings and launchers included, so the whole backend runs on CPU
tensors. Nothing of this is seen by a user: there, the backend takes CUDA tensors alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from actscale_fast.ops import backends

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += ["-ffp-contract=fast", "-march=native"]  # products are contracted into sums, as nvcc does it
FLAGS += ["-DACTSCALE_CUDA", "-DACTSCALE_EMULATE_CUDA", f"-I{CSRC}", f"-I{HERE}"]


def skip_where_it_cannot_be_built() -> None:
    if sys.platform != "linux":
        pytest.skip(f"the emulated CUDA device needs Linux, this is {sys.platform}")
    if not shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):
        pytest.skip("the emulated CUDA device needs a C++ compiler")


def compiled(target: Path, sources: list[Path], *flags: str) -> Path:
    """`target`, built from the kernels and `sources`; RuntimeError with the compiler's messages where it fails."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    objects, processes = [], []
    for source in [*sorted((CSRC / "cuda").glob("*.cu")), *sources]:
        objects.append(str(target.parent / f"{target.stem}.{source.name}.o"))
        command = [*compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    messages = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(messages))
    linked = subprocess.run([*compiler, *flags, *objects, "-o", str(target)], capture_output=True, text=True)
    if linked.returncode:
        raise RuntimeError(linked.stderr)
    return target


#: Multiprocessors; bytes of shared memory a block, a multiprocessor, and kept by the system; blocks a cluster.
Limits = tuple[int, int, int, int, int]
H100: Limits = (132, 232448, 233472, 1024, 16)
A100: Limits = (108, 166912, 167936, 1024, 1)
SMALL: Limits = (4, 232448, 233472, 1024, 16)  # so that few rows fill it


def kept_build(name: str, sources: list[Path], *flags: str) -> Path:
    """The built file `name`, kept in build/ for every process and run with the same sources and flags."""
    import fcntl

    digest = hashlib.sha256(repr((sys.version, os.environ.get("CXX"), FLAGS, flags)).encode())
    for path in sorted([*CSRC.rglob("*.*"), *HERE.glob("*.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = CSRC.parent / "build" / "emulated_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / digest.hexdigest()[:16] / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                built = compiled(Path(fresh, name), sources, *flags)
                target.parent.mkdir(exist_ok=True)
                built.rename(target)
    return target


@functools.cache
def emulated_kernels() -> ModuleType:
    """The module that `ops/cuda` calls, over the emulated device."""
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [CSRC / "bindings" / "cuda.cpp", HERE / "module.cpp"]
    target = kept_build("emulated_kernels.so", sources, "-shared", "-fPIC", "-fvisibility=hidden", *includes)
    spec = importlib.util.spec_from_file_location("emulated_kernels", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated_backend(limits: Limits = SMALL) -> Iterator[ModuleType]:
    """Within the `with` block, the backend "cuda" runs on CPU tensors; skips where it cannot be built."""
    skip_where_it_cannot_be_built()
    kernels = emulated_kernels()
    from actscale_fast.ops.cuda import launch

    scale_heads, dynamic_scale, scale_channels = (
        importlib.import_module(f"actscale_fast.ops.cuda.{op}")
        for op in ("scale_heads", "dynamic_scale", "scale_channels")
    )

    unavailable, resolve = backends.unavailable, backends.resolve

    def resolved(device: torch.device, dtype: torch.dtype) -> str:
        emulated = backends.get_backend() == "cuda" and device.type == "cpu" and dtype in backends.KERNEL_DTYPES
        return "cuda" if emulated else resolve(device, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "unavailable", lambda name: "" if name == "cuda" else unavailable(name))
        patch.setattr(backends, "resolve", resolved)
        patch.setattr(launch, "kernels", kernels.cuda)
        kernels.set_limits(*limits), kernels.set_cluster_room(16)
        scale_heads._partials.cache_clear(), dynamic_scale._chunks.cache_clear()  # sizes for another device
        scale_channels._parts.cache_clear()
        kernels.run_threads_backwards(False)
        with backends.use_backend("cuda"):
            yield kernels
