"""The CUDA kernels as nvcc compiles them for one architecture.

The installed extension holds them, with their PTX; where it was built from other sources, or without CUDA, nvcc
compiles them once for all tests that read them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import sass

CSRC = Path(__file__).resolve().parents[2] / "csrc"


class Usage(NamedTuple):
    """What a thread of a kernel takes; a spilled register lies in local memory."""

    registers: int
    stack: int  # bytes
    local: int  # bytes


class Compiled(NamedTuple):
    """The machine code (*.cubin) and PTX (*.ptx) of every kernel for one architecture."""

    folder: Path

    @property
    def cubins(self) -> list[Path]:
        return sorted(self.folder.glob("*.cubin"))

    @property
    def usage(self) -> dict[str, Usage]:
        """By the kernel's mangled name, as cuobjdump tells it."""
        command = [sass.tool("cuobjdump"), "--dump-resource-usage"]
        texts = (subprocess.check_output([*command, path], text=True) for path in self.cubins)
        numbers = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
        return {name: Usage(*map(int, usage)) for text in texts for name, *usage in re.findall(numbers, text)}

    @property
    def ptx(self) -> dict[str, str]:
        """The PTX by the name of the source file, which is part of the names of its kernels."""
        texts = [path.read_text() for path in sorted(self.folder.glob("*.ptx"))]
        return {
            named[1]: text for text in texts if (named := re.search(r"\.entry \w+?_[0-9a-f]{8}_\d+_(\w+?)_cu_", text))
        }


def available() -> str:
    """Why the kernels cannot be had here; "" where they can."""
    if not CSRC.is_dir():
        return "needs the source tree"
    if not sass.tool("cuobjdump"):
        return "cuobjdump is neither on PATH nor installed with Triton"
    return "" if extension() or shutil.which("nvcc") else "nvcc is not on PATH"


@functools.cache
def extension() -> Path | None:
    """The installed extension, if it holds the CUDA kernels of these sources."""
    try:
        from actscale_fast.ops import _C
    except ImportError:
        return None
    record = getattr(_C, "build_record", dict)()
    if not hasattr(_C, "cuda") or record.get("sources") != digest_of_sources():
        return None
    return Path(_C.__file__)


def digest_of_sources() -> str:
    """The digest that a build from these sources keeps in the extension."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(CSRC.parent / "setup.py"))["digest_of_sources"]()


@functools.cache
def compiled(arch: int) -> Compiled:
    """The kernels for sm_<arch>, kept in build/ for every process and run with the same sources and compiler."""
    reason = available()
    if reason:
        pytest.skip(reason)
    kept = CSRC.parent / "build" / "cubins"
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / f"{arch}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for make in (extracted, compiled_anew):
            target = make(arch, kept)
            if any(target.glob("*.cubin")):  # the extension may have been built for other architectures
                return Compiled(target)
    pytest.skip("nvcc is not on PATH, and the installed extension has no kernels for it")


def extracted(arch: int, kept: Path) -> Path:
    """What the extension holds."""
    source = extension()
    if source is None:
        return Path("/nowhere")
    target = kept / f"installed-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}-sm_{arch}"
    for fresh in folders(target, kept):
        command = [sass.tool("cuobjdump"), "-xelf", f"sm_{arch}.cubin", "-xptx", f"sm_{arch}.ptx", source]
        subprocess.run(command, cwd=fresh, check=True, capture_output=True)
        for path in fresh.glob("*.cubin"):
            if b"_kernel" not in path.read_bytes():
                path.unlink()  # host code and the linker's own
    return target


def compiled_anew(arch: int, kept: Path) -> Path:
    """What nvcc makes of every file of csrc/cuda."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return Path("/nowhere")
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "--keep", "-cubin"]
    digest = hashlib.sha256(repr(command).encode() + subprocess.check_output([nvcc, "--version"]))
    for path in sorted([*(CSRC / "cuda").iterdir(), CSRC / "calls.h"]):
        digest.update(path.name.encode() + path.read_bytes())
    target = kept / f"{digest.hexdigest()[:16]}-sm_{arch}"
    for fresh in folders(target, kept):
        sources = [str(path) for path in sorted((CSRC / "cuda").glob("*.cu"))]
        command += ["--keep-dir", str(fresh), "--output-directory", str(fresh), *sources]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        for path in fresh.iterdir():
            if path.suffix not in (".ptx", ".cubin"):
                path.unlink()
    return target


def folders(target: Path, kept: Path) -> Iterator[Path]:
    """One folder to fill, which becomes `target`; none where that is there already."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=kept) as fresh:
            made = Path(fresh, "made")
            made.mkdir()
            yield made
            made.rename(target)
