"""Builds `actscale_fast._C` from csrc with ninja; everything else about the package stands in pyproject.toml.

Environment: CXX (the compiler), ACTSCALE_BUILD_CUDA=auto|0|1, ACTSCALE_CUDA_ARCHS (default "80;90;100"), MAX_JOBS.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).parent / "csrc"
# Chosen by CPUID when the package runs; each file is compiled for its own instructions, all others for the baseline.
SIMD_FLAGS = {"cpu_avx2": "-mavx2 -mfma -mf16c", "cpu_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"}
WARNING = (
    "actscale-fast: no working C++ compiler ({}), so the package is installed without its C++ kernels. Everything works, "
    "but on a CPU the loss and the scaling run in plain PyTorch, several times slower. Install a C++17 compiler (or set "
    "CXX) and install again."
)


def compiles(command: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        try:
            run = subprocess.run([*command, str(source), "-o", str(Path(folder, "probe"))], capture_output=True)
        except OSError:
            return False
        return run.returncode == 0


def nvcc(sources: list[Path]) -> str | None:
    """The CUDA compiler where CUDA kernels are to be built."""
    choice = os.environ.get("ACTSCALE_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise CompileError(f"ACTSCALE_BUILD_CUDA: got {choice!r}, expected auto, 0 or 1")
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if choice == "1" and not path:
        raise CompileError("ACTSCALE_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH")
    if choice == "1" and not sources:
        raise CompileError("ACTSCALE_BUILD_CUDA=1, but this version ships no CUDA kernels; use auto or 0")
    return path if choice != "0" and sources else None


class BuildWithNinja(build_ext):
    def run(self) -> None:
        self.cuda = nvcc(sorted(CSRC.glob("*.cu")))
        self.cxx = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
        if sys.platform == "win32" or not compiles(self.cxx):
            print(f"warning: {WARNING.format(shlex.join(self.cxx))}", file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        openmp = "-fopenmp" if compiles([*self.cxx, "-fopenmp"]) else "-Wno-unknown-pragmas"
        flags = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wno-uninitialized -Wno-maybe-uninitialized"
        flags += "".join(f' -I"{path}"' for path in includes) + (" -DACTSCALE_CUDA" if self.cuda else "")
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        link = f"{shlex.join(self.cxx)} {shared} {openmp}"
        if self.cuda:
            archs = os.environ.get("ACTSCALE_CUDA_ARCHS", "80;90;100").split(";")
            codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
            codes += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
            link = f"{self.cuda} -cudart static -shared -Xcompiler {openmp}"
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sources = [p for p in sorted(CSRC.glob("*.cpp")) if x86 or p.stem not in SIMD_FLAGS]
        lines = ["ninja_required_version = 1.8", f"rule link\n command = {link} $in -o $out"]
        lines += [f"rule cxx\n depfile = $out.d\n command = {shlex.join(self.cxx)} {flags} {openmp} $simd -MMD -MF $out.d -c $in -o $out"]
        if self.cuda:
            lines += [f"rule cuda\n depfile = $out.d\n command = {self.cuda} -std=c++17 -O3 -Xcompiler -fPIC {codes} -MMD -MF $out.d -c $in -o $out"]
            sources += sorted(CSRC.glob("*.cu"))
        for path in sources:
            lines += [f"build {path.name}.o: {'cuda' if path.suffix == '.cu' else 'cxx'} {escaped(path)}"]
            lines += [f" simd = {SIMD_FLAGS.get(path.stem, '')}"]
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        lines += [f"build {escaped(target)}: link {' '.join(f'{p.name}.o' for p in sources)}", ""]
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), *jobs]).returncode:
            raise CompileError("the C++ extension did not compile; the compiler's messages are above")


def escaped(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("actscale_fast._C", sources=[])], cmdclass={"build_ext": BuildWithNinja})
