"""The C++ kernels stay within their tensors and their scratch: a run under the sanitizers (`make sanitize`)."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
FLAGS = ("-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", f"-I{CSRC}", *SANITIZERS)
LEVELS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, compiler = tmp_path_factory.mktemp("bounds"), shlex.split(os.environ.get("CXX") or "c++")
    (folder / "probe.cpp").write_text("#include <omp.h>\nint main() { return 0; }\n")
    probe = [*compiler, *FLAGS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    try:
        works = not subprocess.run(probe, capture_output=True).returncode
        works = works and not subprocess.run([folder / "probe"]).returncode
    except FileNotFoundError:
        works = False
    if not works:
        pytest.skip("no compiler with OpenMP and sanitizers was found")
    sources: dict[Path, tuple[str, ...]] = {HERE.parent / "helpers" / "cpu_bounds" / "bounds.cpp": ()}
    for level, flags in LEVELS.items():
        if level == "portable" or platform.machine().lower() in ("x86_64", "amd64"):
            sources[CSRC / "cpu" / f"{level}.cpp"] = flags
    if platform.machine().lower() in ("x86_64", "amd64"):  # what avx512_bf16 and avx512_amx do, on any of these
        for name in ("pairs", "tiles"):
            sources[HERE.parent / "helpers" / "emulated_level_sources" / f"{name}.cpp"] = LEVELS["avx2"]
    running = [
        subprocess.Popen(
            [*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
            stderr=subprocess.PIPE, text=True,
        )
        for source, flags in sources.items()
    ]  # fmt: skip
    messages = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(messages)
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run([*compiler, *FLAGS, *objects, "-o", str(folder / "bounds_of_all")], check=True)
    return folder / "bounds_of_all"


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree")
def test_no_kernel_reads_or_writes_beyond_its_tensors_or_its_scratch(sanitized: Path) -> None:
    done = subprocess.run([sanitized], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("portable: within bounds\n")
