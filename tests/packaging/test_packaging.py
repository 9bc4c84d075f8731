"""The package as others get it: sdist, wheel, an install without a compiler, the CUDA switch, a light import."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import actscale_fast

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("actscale_fast", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )  # fmt: skip


def python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, cwd=cwd, **environment)


def installed(program: str, target: Path) -> subprocess.CompletedProcess[str]:
    """Runs with the package in `target`; -S keeps out the hooks of an editable install, which would find its _C."""
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return python("-S", "-c", program, cwd=target, PYTHONPATH=path, ACTSCALE_BACKEND="auto")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources as a fresh clone has them."""
    return copied(tmp_path / "source tree")


def copied(target: Path) -> Path:
    target.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist as `python -m build` does."""
    pytest.importorskip("build")
    tree = copied(tmp_path_factory.mktemp("build") / "source tree")
    # Without CUDA and optimisation, which take minutes: installing this project for its tests builds it with both, and
    # test_cuda_compile compiles the CUDA kernels.
    compiler = tree.parent / "c++"
    chosen = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    compiler.write_text(f'#!/bin/sh\nexec {chosen} "$@" -O0\n')
    compiler.chmod(0o755)
    done = python("-m", "build", "--no-isolation", cwd=tree, ACTSCALE_BUILD_CUDA="0", CXX=shlex.quote(str(compiler)))
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return sdist, wheel


def test_the_version_stands_in_one_place() -> None:
    assert metadata.version("actscale-fast") == actscale_fast.__version__


def requirements() -> list[Requirement]:
    """Everything that the Makefile asks pip for, but PyTorch and Triton, which it pins by itself."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = described["project"]
    lines = [
        *described["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *lines_of("tests/unpinned.txt"),
        "pip",
    ]
    return [r for r in map(Requirement, lines) if r.name not in ("torch", "triton")]


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def test_the_constraints_pin_every_requirement_to_one_version_that_it_allows() -> None:
    pinned = {canonicalize_name(r.name): r for r in map(Requirement, lines_of("constraints.txt"))}
    for requirement in requirements():
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def test_the_constraints_hold_releases_that_any_machine_can_install() -> None:
    for line in lines_of("constraints.txt"):
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line  # no options, addresses or local builds
        assert not re.match(r"(torch|triton|nvidia|cuda)\b", line), line
    names = [canonicalize_name(line.partition("==")[0]) for line in lines_of("constraints.txt")]
    assert len(names) == len(set(names))


def test_make_pins_pytorch_and_bounds_triton_within_the_declared_range() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    (line,) = re.findall(r"^TORCH +\?= (.*)$", makefile, re.MULTILINE)
    (torch,) = re.findall(r"torch==([\d.]+)", line)
    assert declared["torch"].contains(torch)
    (least,) = re.findall(r"triton>=([\d.]+),<[\d.]+", line)
    assert declared["triton"].contains(least)


@pytest.mark.slow
def test_the_sdist_holds_the_kernels_sources(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "actscale_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_the_wheel_holds_the_extension_and_not_its_sources(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        described, declared = (
            archive.read(next(name for name in names if name.endswith(end))).decode()
            for end in ("METADATA", "entry_points.txt")
        )
    python_files = {str(path.relative_to(ROOT)) for path in (ROOT / "actscale_fast").rglob("*.py")}
    assert python_files | {"actscale_fast/py.typed"} <= names
    assert [name for name in names if name.startswith("actscale_fast/ops/_C.") and name.endswith(".so")]
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks")) or name.endswith(".cpp")]
    assert f"\nVersion: {actscale_fast.__version__}\n" in described
    assert "License-Expression: Apache-2.0" in described
    assert "[actscale_fast.interventions]\nBoundlessDAS = actscale_fast.das.boundless_das:BoundlessDAS\n" in declared


@pytest.mark.slow
def test_the_wheel_installs_and_its_kernels_run(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = python("-m", "pip", "install", "--no-deps", "--target", target, distributions[1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program = (
        "import torch, actscale_fast as af; af.set_backend('cpu')\n"
        "print(af.__file__, af.ops.scale_heads(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)).tolist())"
    )
    used = installed(program, target)
    assert used.stdout.split(maxsplit=1) == [f"{target}/actscale_fast/__init__.py", "[[[[2.0, 2.0]]]]\n"], used.stderr


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_once_what_is_slower(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    done = python(
        "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", target, tree,
        cwd=tmp_path, CXX="/nowhere/c++", CC="/nowhere/cc", ACTSCALE_BUILD_CUDA="auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("no C++17 compiler that finds Python.h in") == 1
    assert "(tried: /nowhere/c++)" in done.stdout + done.stderr
    program = (
        "import torch, actscale_fast as af\n"
        "for _ in range(2): y = af.ops.scale_heads(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1))\n"
        "print(y.tolist())"
    )
    used = installed(program, target)
    assert used.stdout == "[[[[2.0, 2.0]]]]\n", used.stderr
    assert used.stderr.count("several times slower") == 1


def test_what_a_compiler_says_becomes_a_valid_string_of_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    script = tmp_path / "c++"
    said = rb"printf '\033[31merror\033[0m: \342\200\230x\342\200\231 \360\237\231\202 \377 \"\\\\\" ??/ '"
    script.write_bytes(b"#!/bin/sh\n" + said + b'"$LC_ALL"\n')
    script.chmod(0o755)
    monkeypatch.setenv("LC_ALL", "")
    version = build["version_of"]([str(script)])
    assert "error" in version
    assert version.endswith(" C")  # its messages are in English
    header = build["record"](version, True, build["Cuda"](missing="é\t", dropped=(("80", version),)))
    assert re.fullmatch(r"[ -~\n]*", header)
    compiler = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    checks = "const char* all[] = {ACTSCALE_COMPILER, ACTSCALE_NVCC, ACTSCALE_NO_CUDA};\n"
    checks += 'const char* dropped[][2] = {ACTSCALE_DROPPED};\nstatic_assert(sizeof(ACTSCALE_NO_CUDA) == 3, "");\n'
    (tmp_path / "check.cpp").write_text(header + checks, encoding="ascii")
    flags = ("-std=c++17", "-trigraphs", "-Wall", "-Werror", "-fsyntax-only")
    done = run(compiler, *flags, tmp_path / "check.cpp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def build_extension(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("setup.py", "build_ext", cwd=tree, **environment)


@pytest.mark.skipif(
    Path(sysconfig.get_config_var("CXX") or "c++").is_absolute(), reason="Python names its compiler's path"
)
def test_without_a_choice_the_first_compiler_that_works_is_taken(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compilers"
    folder.mkdir()
    only = '#!/bin/sh\ncase " $* " in *" -c "*) echo the third one compiles; exit 1;; esac\n'
    for name, script in (("c++", "#!/bin/sh\nexit 1\n"), ("g++", "#!/bin/sh\nexit 1\n"), ("clang++", only)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    done = build_extension(tree, CXX="", PATH=str(folder), ACTSCALE_BUILD_CUDA="0")
    assert "the third one compiles" in done.stdout + done.stderr


def test_cuda_asked_for_without_its_compiler_fails_with_the_reason(tree: Path) -> None:
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    done = build_extension(tree, ACTSCALE_BUILD_CUDA="1", CUDA_HOME="", PATH=os.pathsep.join(folders))
    assert done.returncode != 0
    assert "ACTSCALE_BUILD_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH" in done.stderr


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_cuda_compiler_that_fails_is_an_error_where_it_was_asked_for_and_a_warning_else(
    tree: Path, tmp_path: Path, choice: str
) -> None:
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    for source in [*(tree / "csrc").rglob("*.cpp"), *(tree / "csrc").rglob("*.cu")]:
        source.unlink()  # nothing is left to build
    done = build_extension(tree, ACTSCALE_BUILD_CUDA=choice, CUDA_HOME=str(tmp_path / "cuda"), ACTSCALE_CUDA_ARCHS="90")
    asked = "ACTSCALE_BUILD_CUDA=1, but " if choice == "1" else "warning: actscale-fast: "
    assert f"{asked}{compiler} with the host compiler" in done.stderr
    assert "does not compile for ACTSCALE_CUDA_ARCHS=90" in done.stderr
    assert (done.returncode != 0) if choice == "1" else ("installed without the CUDA kernels" in done.stderr)


def test_an_unknown_cuda_choice_is_refused(tree: Path) -> None:
    done = build_extension(tree, ACTSCALE_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "ACTSCALE_BUILD_CUDA: got 'yes', expected auto, 0 or 1" in done.stderr


def test_architectures_that_nvcc_does_not_know_are_left_out_and_said(tree: Path, tmp_path: Path) -> None:
    """The others are built; the record in the extension keeps what was left out."""
    compiler, called = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "called"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {called}\ncase "$*" in *compute_100*) '
        "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_100'\" >&2; exit 1;; esac\n"
    )
    compiler.chmod(0o755)
    for source in [*(tree / "csrc").rglob("*.cpp"), *(tree / "csrc").rglob("*.cu")]:
        source.unlink()  # nothing is left to build
    done = build_extension(
        tree, ACTSCALE_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path / "cuda"), ACTSCALE_CUDA_ARCHS="8.0, 9.0;100"
    )
    message = "nvcc fatal   : Unsupported gpu architecture 'compute_100'"
    assert f"warning: actscale-fast: no CUDA kernels for architecture 100: {message}\n" in done.stderr
    assert "installed without the CUDA kernels" not in done.stderr
    (header,) = (tree / "build").rglob("build_record.h")
    text = header.read_text()
    assert f'#define ACTSCALE_DROPPED {{"100", "{message}"}}\n' in text
    assert f'#define ACTSCALE_NVCC "{compiler}"\n' in text
    (rules,) = (tree / "build").rglob("build.ninja")
    assert "compute_90" in rules.read_text()
    assert "compute_100" not in rules.read_text()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="a level of x86-64")
@pytest.mark.parametrize(
    ("level", "sign", "message"),
    [
        ("avx512_bf16", "_mm512_dpbf16_ps", ""),
        ("avx512_bf16", "_mm512_dpbf16_ps", "c++: error: unrecognized command-line option '-mavx512bf16'"),
        # of an assembler that is older than the compiler
        ("avx512_bf16", "_mm512_dpbf16_ps", "probe.s:12: Error: no such instruction: vdpbf16ps"),
        ("avx512_amx", "tdpbf16ps", "c++: error: unrecognized command-line option '-mamx-tile'"),
    ],
)
def test_instructions_that_the_compiler_does_not_know_are_left_out_and_said(
    tree: Path, tmp_path: Path, level: str, sign: str, message: str
) -> None:
    """The rest of the extension is built; the record in it keeps what was left out."""
    compiler, known = tmp_path / "c++", not message
    real = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) or shutil.which("c++")
    if real is None:
        pytest.skip("needs a C++ compiler")
    uses = f"grep -q {sign} probe.cpp 2>/dev/null && "
    others = (
        "grep -q -e _mm512_dpbf16_ps -e tdpbf16ps probe.cpp 2>/dev/null && exit 0\n"  # the real one may not know it
    )
    refusal = "" if known else f'{uses}{{ echo "{message}" >&2; exit 1; }}\n'
    sources = 'case "$*" in *" -c "*) echo none is compiled here >&2; exit 1;; esac\n'
    compiler.write_text(f'#!/bin/sh\n{refusal}{others}{sources}exec {real} "$@"\n')
    compiler.chmod(0o755)
    done = build_extension(tree, CXX=str(compiler), ACTSCALE_BUILD_CUDA="0")
    warning = f"warning: actscale-fast: no C++ kernels for the level {level}: {message}\n"
    assert (warning in done.stderr) != known
    (header,) = (tree / "build").rglob("build_record.h")
    assert f"#define ACTSCALE_{level.upper()} {int(known)}\n" in header.read_text()
    assert known or message in header.read_text()
    (rules,) = (tree / "build").rglob("build.ninja")
    assert (f"{level}.cpp" in rules.read_text()) == known
    assert "avx512.cpp" in rules.read_text()
