"""The CUDA kernels as nvcc compiles them for one architecture, once for all tests that read them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


class Compiled(NamedTuple):
    """What nvcc made of every file of csrc/cuda."""

    folder: Path  # <file>.cubin

    @property
    def report(self) -> str:
        """What ptxas -v says of registers, stack and spills."""
        return (self.folder / "report").read_text()

    @property
    def ptx(self) -> dict[str, str]:
        """The PTX by the file's name."""
        return {path.name.partition(".")[0]: path.read_text() for path in self.folder.glob("*.ptx")}


@functools.cache
def compiled(arch: int) -> Compiled:
    """The kernels for sm_<arch>, kept in build/ for every process and run with the same sources and compiler."""
    nvcc = shutil.which("nvcc")
    if not nvcc or not CSRC.is_dir():
        pytest.skip("nvcc is not on PATH" if CSRC.is_dir() else "needs the source tree")
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "--keep", "-cubin"]
    digest = hashlib.sha256(repr(command).encode() + subprocess.check_output([nvcc, "--version"]))
    for path in sorted([*(CSRC / "cuda").iterdir(), CSRC / "calls.h"]):
        digest.update(path.name.encode() + path.read_bytes())
    kept = CSRC.parent / "build" / "cubins"
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{digest.hexdigest()[:16]}-sm_{arch}"
    with (kept / f"{arch}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=kept) as fresh:
                sources = [str(path) for path in sorted((CSRC / "cuda").glob("*.cu"))]
                command += ["--keep-dir", fresh, "--output-directory", fresh, *sources]
                done = subprocess.run(command, capture_output=True, text=True, timeout=900)
                assert done.returncode == 0, done.stderr
                made = Path(fresh, "made")
                made.mkdir()
                for path in Path(fresh).iterdir():
                    if path.suffix in (".ptx", ".cubin"):
                        path.rename(made / path.name)
                (made / "report").write_text(done.stderr)
                made.rename(target)
    return Compiled(target)
