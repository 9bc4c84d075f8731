"""The CUDA kernels, emulated, stay within their tensors: a run under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_emulation.emulation import HERE, kept_build, skip_where_it_cannot_be_built

SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_where_it_cannot_be_built()
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = ["c++", *SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([folder / "probe"]).returncode:
        pytest.skip("the compiler has no sanitizers here")
    return kept_build("bounds", [HERE / "bounds.cpp"], *SANITIZERS)


@pytest.mark.sanitizer
@pytest.mark.slow
def test_no_kernel_reads_or_writes_beyond_its_tensors_or_off_their_alignment(sanitized: Path) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([sanitized], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "within bounds\n"
