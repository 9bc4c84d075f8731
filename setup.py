"""Builds `actscale_fast.ops._C` from csrc with ninja; everything else about the package stands in pyproject.toml.

Environment: CXX (the compiler), ACTSCALE_BUILD_CUDA=auto|0|1, ACTSCALE_CUDA_ARCHS (default "80;90;100"), MAX_JOBS,
ACTSCALE_WERROR=1 (the C++ compiler's warnings are errors; for CI). Architectures that nvcc does not know, and
instructions that the C++ compiler does not know, are left out, with a warning and in the record that
`actscale-fast doctor` prints."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
PYTHON_HEADERS = sysconfig.get_paths()["include"]
# Compiled for their own instructions and chosen by CPUID when the package runs; all other files are for the baseline.
SIMD = {"avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"}
SIMD["avx512_bf16"] = f"{SIMD['avx512']} -mavx512bf16"  # these are left out where the compiler does not know them
SIMD["avx512_amx"] = f"{SIMD['avx512']} -mamx-tile -mamx-bf16"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall"
FLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12 gives them for its own AVX-512 header
FLAGS += " -Werror" if os.environ.get("ACTSCALE_WERROR") == "1" else ""
NO_COMPILER = """warning: actscale-fast has no C++ kernels: no C++17 compiler that finds Python.h in {} (tried: {}).
Plain PyTorch is several times slower on a CPU. Install a C++17 compiler (or set CXX) and Python's headers."""
ARCHS = re.findall(r"[^\s;,]+", os.environ.get("ACTSCALE_CUDA_ARCHS", "80;90;100").replace(".", ""))
CUDA = ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
PROBE = """#include <Python.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error the kernels need sm_80 or later
#endif
int main() { return 0; }
"""


def said_by(command: Sequence[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a compiler, whose messages are to be English and in ASCII."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace")


def complaint(*command: str, program: str = PROBE) -> str:
    """What the compiler says of a program, an empty one by default, in one line; "" where it compiles it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(program)
        command = (*command, "-std=c++17", f"-I{PYTHON_HEADERS}", "probe.cpp", "-o", "probe")
        try:
            done = said_by(command, cwd=folder)
        except OSError as error:
            return str(error)
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = [line for line in lines if "error" in line or "fatal" in line] or lines or ["it fails without a message"]
    return said[0] if done.returncode else ""


def compiles(*command: str) -> bool:
    return not complaint(*command)


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def targets(archs: Iterable[str]) -> list[str]:
    """Options of nvcc: for each architecture a binary, and PTX for the GPUs that come later."""
    return [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]" for arch in archs]


class Cuda(NamedTuple):
    """How the CUDA kernels are built; the extension keeps it, for `actscale-fast doctor`."""

    nvcc: str = ""
    archs: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()  # architectures, and what nvcc says of each
    missing: str = ""  # why no CUDA kernels are built


def cuda(cxx: str) -> Cuda:
    """The CUDA compiler and the architectures that it knows."""
    choice, home = os.environ.get("ACTSCALE_BUILD_CUDA", "auto"), os.environ.get("CUDA_HOME")
    if choice not in ("auto", "0", "1"):
        raise CompileError(f"ACTSCALE_BUILD_CUDA: got {choice!r}, expected auto, 0 or 1")
    if choice == "0":
        return Cuda(missing="ACTSCALE_BUILD_CUDA=0 at installation")
    path = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if not path:
        if choice == "1":
            raise CompileError("ACTSCALE_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH")
        return Cuda(missing=f"no nvcc at installation ({f'CUDA_HOME={home}' if home else 'not on PATH'})")
    probe = (path, "-x", "cu", "-ccbin", cxx, *CUDA)
    found = Cuda(path, tuple(ARCHS))
    if not ARCHS or not compiles(*probe, *targets(ARCHS)):
        said = {arch: complaint(*probe, *targets([arch])) for arch in ARCHS}
        dropped = tuple((arch, reason) for arch, reason in said.items() if reason)
        found = Cuda(path, tuple(arch for arch in said if not said[arch]), dropped)
    if found.archs:
        for arch, reason in found.dropped:
            print(f"warning: actscale-fast: no CUDA kernels for architecture {arch}: {reason}", file=sys.stderr)
        return found
    reason = f"{path} with the host compiler {cxx} does not compile for ACTSCALE_CUDA_ARCHS={';'.join(ARCHS)}"
    reason += "".join(f"; {arch}: {said}" for arch, said in found.dropped)
    if choice == "1":
        raise CompileError(f"ACTSCALE_BUILD_CUDA=1, but {reason}")
    print(f"warning: actscale-fast: {reason}: installed without the CUDA kernels", file=sys.stderr)
    return Cuda(missing=reason, dropped=found.dropped)


#: The options alone are not enough: the header may lack the types, and the assembler the instructions.
PROBES = {
    "avx512_bf16": """#include <immintrin.h>
__m512 probed(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
int main() { return 0; }
""",
    "avx512_amx": """#include <immintrin.h>
void probed() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }
int main() { return 0; }
""",
}


def unknown_levels(cxx: Sequence[str]) -> dict[str, str]:
    """Levels whose instructions the compiler does not know, and what it says."""
    said = {level: complaint(*cxx, *SIMD[level].split(), program=program) for level, program in PROBES.items()}
    for level, reason in said.items():
        if reason:
            print(f"warning: actscale-fast: no C++ kernels for the level {level}: {reason}", file=sys.stderr)
    return {level: reason for level, reason in said.items() if reason}


def literal(text: str) -> str:
    """A text as a string literal of C++, with "?" for all but printable ASCII, which JSON and C++ escape alike."""
    shown = json.dumps("".join(letter if " " <= letter <= "~" else "?" for letter in text))
    return shown.replace("?", "\\?")  # "??" may begin a trigraph


def digest_of_sources() -> str:
    """Tells whether an extension was built from these sources."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(CSRC).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def record(compiler: str, openmp: bool, built: Cuda, dropped_levels: Mapping[str, str] | None = None) -> str:
    """A header with what the extension says of its own build."""
    left_out = dropped_levels or {}
    texts = {"COMPILER": compiler, "NVCC": built.nvcc, "NO_CUDA": built.missing, "SOURCES": digest_of_sources()}
    lines = [f"#define ACTSCALE_{name} {literal(text)}" for name, text in texts.items()]
    pairs = ", ".join(f"{{{literal(arch)}, {literal(reason)}}}" for arch, reason in built.dropped)
    levels = ", ".join(f"{{{literal(level)}, {literal(reason)}}}" for level, reason in left_out.items())
    lines += [f"#define ACTSCALE_OPENMP {int(openmp)}", f"#define ACTSCALE_DROPPED {pairs}"]
    lines += [f"#define ACTSCALE_{level.upper()} {int(level not in left_out)}" for level in PROBES]
    return "\n".join([*lines, f"#define ACTSCALE_DROPPED_LEVELS {levels}", ""])


def version_of(cxx: list[str]) -> str:
    """The first line of the compiler's own description."""
    said = said_by([*cxx, "--version"]).stdout.splitlines()
    return said[0] if said else shlex.join(cxx)


def write_if_changed(path: Path, text: str) -> None:
    """Writes the file unless it holds this already: ninja compiles what is newer."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildWithNinja(build_ext):
    def run(self) -> None:
        chosen = os.environ.get("CXX")
        names = [chosen] if chosen else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
        self.cxx = next((c for c in map(shlex.split, names) if sys.platform != "win32" and compiles(*c)), [])
        if not self.cxx:
            print(NO_COMPILER.format(PYTHON_HEADERS, ", ".join(dict.fromkeys(names))), file=sys.stderr)
            self.extensions = []
        self.cuda = cuda(self.cxx[0] if self.cxx else "c++")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        folder, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        self.mkpath(str(folder)), self.mkpath(str(target.parent))
        cxx, openmp = shlex.join(self.cxx), "-fopenmp" if compiles(*self.cxx, "-fopenmp") else "-Wno-unknown-pragmas"
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        dropped = unknown_levels(self.cxx) if x86 else {}
        about = record(version_of(self.cxx), openmp == "-fopenmp", self.cuda, dropped)
        write_if_changed(folder / "build_record.h", about)
        flags = shlex.join(f"-I{h}" for h in (pybind11.get_include(), PYTHON_HEADERS, str(folder)))
        rules = {".cpp": f"{cxx} {FLAGS} {openmp} {flags} $simd"}
        link = f"{cxx} {'-bundle -undefined dynamic_lookup' if sys.platform == 'darwin' else '-shared'} {openmp}"
        if self.cuda.nvcc:
            link = shlex.join([self.cuda.nvcc, "-ccbin", self.cxx[0]])
            options = shlex.join([*CUDA, *targets(self.cuda.archs)])
            rules = {".cpp": f"{rules['.cpp']} -DACTSCALE_CUDA", ".cu": f"{link} -std=c++17 {options}"}
            link += f" -shared -cudart static -Xcompiler {openmp}"
        skipped = dropped if x86 else SIMD
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
