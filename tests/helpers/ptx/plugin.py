"""pytest -p ptx.plugin: Triton's and CUDA's kernels run as the PTX that a GPU would get, on CPU tensors.

ACTSCALE_PTX_REPORT names a file that takes the number of launches of each kernel.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

#: Apart from other runs' cache: what is kept here has no machine code.
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).resolve().parents[3] / "build" / "ptx" / "triton")

#: Triton's own functions are defined for the compiler or the interpreter when it is imported.
os.environ["TRITON_INTERPRET"] = "0"

from . import triton_hook

triton_hook.install()
os.environ["TRITON_INTERPRET"] = "1"  # read by the package alone from now on: its Triton backend takes CPU tensors


def pytest_configure(config: pytest.Config) -> None:
    from . import cuda_hook

    if cuda_hook.is_available():
        cuda_hook.install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from .programs import launches

    counts = dict(sorted(launches.items()))
    terminalreporter.write_line(f"launches of real PTX: {counts}")
    if report := os.environ.get("ACTSCALE_PTX_REPORT"):
        Path(report).write_text(json.dumps(counts))
