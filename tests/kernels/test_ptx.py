"""The kernels keep their claims as the PTX that a GPU would get, on the interpreter of tests/helpers/ptx.

Triton's interpreter is chosen when Triton is imported, so these tests run in a process of their own. `make test-ptx`
runs all of the kernels' tests so; here is a part of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx import cuda_hook

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("ptx.plugin" in sys.modules, reason="runs the tests of this session in another one"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree"),
]
pytest.importorskip("triton.backends.nvidia", reason="Triton is not installed, or not for NVIDIA GPUs")


def run_on_ptx(report: Path, *arguments: str) -> dict[str, int]:
    """Launches by kernel of a pytest session on real PTX, all of whose tests must pass."""
    path = [str(ROOT / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "ACTSCALE_PTX_REPORT": str(report)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of this session and its process
    options = ["-p", "ptx.plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "not gpu and not large"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def kernels_of_triton() -> set[str]:
    folder = ROOT / "actscale_fast" / "ops" / "triton"
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    return {f"triton/{line[4 : line.index('(')]}" for line in lines if line.startswith("def ") and "_kernel(" in line}


def kernels_of_cuda() -> set[str]:
    if not cuda_hook.is_available():
        return set()
    return {f"cuda/{kernel}" for kernel in cuda_hook.titles()}


def test_every_kernel_gives_the_results_of_the_formulas_and_every_injected_fault_is_caught(tmp_path: Path) -> None:
    launches = run_on_ptx(tmp_path / "launches.json", "tests/kernels/test_ptx_faults.py")
    missing = (kernels_of_triton() | kernels_of_cuda()) - set(launches)
    assert missing <= {"cuda/count_step_kernel"}, missing  # one thread that counts, of an optimiser's large tensors


def test_one_case_of_each_claim_about_the_kernels_holds_on_real_ptx(tmp_path: Path) -> None:
    """−inf, ids out of range, equal rows, rows anywhere in memory, in place, every cluster, two runs."""
    backends = ("triton_loss", "triton_scaling", "triton_kernels", "cuda_kernels", "cuda_scaling")
    files = [f"tests/kernels/test_{name}.py" for name in backends]
    launches = run_on_ptx(tmp_path / "launches.json", "--fast", *files)
    assert {name.partition("/")[0] for name in launches} == {"triton", *(["cuda"] if kernels_of_cuda() else [])}
