"""Builds `actscale_fast.ops._C` from csrc with ninja; everything else about the package stands in pyproject.toml.

Environment: CXX (the compiler), ACTSCALE_BUILD_CUDA=auto|0|1, ACTSCALE_CUDA_ARCHS (default "80;90;100"), MAX_JOBS,
ACTSCALE_WERROR=1 (the C++ compiler's warnings are errors; for CI)."""

import contextlib
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

CSRC = Path(__file__).resolve().parent / "csrc"
PYTHON_HEADERS = sysconfig.get_paths()["include"]
# Compiled for their own instructions and chosen by CPUID when the package runs; all other files are for the baseline.
SIMD = {"avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall"
FLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12 gives them for its own AVX-512 header
FLAGS += " -Werror" if os.environ.get("ACTSCALE_WERROR") == "1" else ""
NO_COMPILER = """warning: actscale-fast has no C++ kernels: no C++17 compiler that finds Python.h in {} (tried: {}).
Plain PyTorch is several times slower on a CPU. Install a C++17 compiler (or set CXX) and Python's headers."""
ARCHS = os.environ.get("ACTSCALE_CUDA_ARCHS", "80;90;100")
CUDA = [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]" for arch in ARCHS.split(";")]
CUDA += ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def compiles(*command: str) -> bool:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        Path(folder, "probe.cpp").write_text("#include <Python.h>\nint main() { return 0; }\n")
        command = (*command, "-std=c++17", f"-I{PYTHON_HEADERS}", "probe.cpp", "-o", "probe")
        return not subprocess.run(command, cwd=folder, capture_output=True).returncode
    return False


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def nvcc(cxx: str) -> str:
    """The CUDA compiler where CUDA kernels are to be built, else ""."""
    choice, home = os.environ.get("ACTSCALE_BUILD_CUDA", "auto"), os.environ.get("CUDA_HOME")
    if choice not in ("auto", "0", "1"):
        raise CompileError(f"ACTSCALE_BUILD_CUDA: got {choice!r}, expected auto, 0 or 1")
    path = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) if choice != "0" else ""
    if choice == "1" and not path:
        raise CompileError("ACTSCALE_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH")
    if not path or compiles(path, "-x", "cu", "-ccbin", cxx, *CUDA):
        return path or ""
    reason = f"{path} with the host compiler {cxx} does not compile for ACTSCALE_CUDA_ARCHS={ARCHS}"
    if choice == "1":
        raise CompileError(f"ACTSCALE_BUILD_CUDA=1, but {reason}")
    print(f"warning: actscale-fast: {reason}: installed without the CUDA kernels", file=sys.stderr)
    return ""


class BuildWithNinja(build_ext):
    def run(self) -> None:
        chosen = os.environ.get("CXX")
        names = [chosen] if chosen else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
        self.cxx = next((c for c in map(shlex.split, names) if sys.platform != "win32" and compiles(*c)), [])
        if not self.cxx:
            print(NO_COMPILER.format(PYTHON_HEADERS, ", ".join(dict.fromkeys(names))), file=sys.stderr)
            self.extensions = []
        self.nvcc = nvcc(self.cxx[0] if self.cxx else "c++")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        self.mkpath(str(folder)), self.mkpath(str(target.parent))
        cxx, openmp = shlex.join(self.cxx), "-fopenmp" if compiles(*self.cxx, "-fopenmp") else "-Wno-unknown-pragmas"
        flags = shlex.join(f"-I{h}" for h in (pybind11.get_include(), PYTHON_HEADERS))
        rules = {".cpp": f"{cxx} {FLAGS} {openmp} {flags} $simd"}
        link = f"{cxx} {'-bundle -undefined dynamic_lookup' if sys.platform == 'darwin' else '-shared'} {openmp}"
        if self.nvcc:
            link = shlex.join([self.nvcc, "-ccbin", self.cxx[0]])
            rules = {".cpp": f"{rules['.cpp']} -DACTSCALE_CUDA", ".cu": f"{link} -std=c++17 {shlex.join(CUDA)}"}
            link += f" -shared -cudart static -Xcompiler {openmp}"
        skipped = () if platform.machine().lower() in ("x86_64", "amd64") else SIMD
        sources = [p for p in sorted(CSRC.rglob("*")) if p.suffix in rules and p.stem not in skipped]
        objects = {p: f"{p.parent.name}-{p.name}.o" for p in sources}
        lines = [f"rule link\n command = {link} $in -o $out"]
        for suffix, command in rules.items():
            lines += [f"rule {suffix[1:]}\n depfile = $out.d\n command = {command} -MMD -MF $out.d -c $in -o $out"]
        lines += [f"build {objects[p]}: {p.suffix[1:]} {escaped(p)}\n simd = {SIMD.get(p.stem, '')}" for p in sources]
        lines += [f"build {escaped(target)}: link {' '.join(objects.values())}\n"]
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([sys.executable, "-m", "ninja", "-C", folder, *jobs]).returncode:
            raise CompileError("the C++ extension did not compile; the compiler's messages are above")


setup(ext_modules=[Extension("actscale_fast.ops._C", sources=[])], cmdclass={"build_ext": BuildWithNinja})
