"""`actscale-fast bench`: run the benchmarks of a source checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def bench(arguments: Sequence[str]) -> int:
    """Run `python -m benchmarks` with these arguments and return its exit status."""
    package = Path(__file__).resolve().parents[2]
    for root in (package, Path.cwd()):
        if (root / "benchmarks" / "__main__.py").is_file():
            words = [word for position, word in enumerate(arguments) if word != "--" or position]
            # With this variable Python would not look for a module in the working directory.
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
            return subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=root, env=environment).returncode
    raise FileNotFoundError(
        f"there is no folder benchmarks in {package} or {Path.cwd()}; the installed package does not contain it, so "
        "run this command in a checkout of the source"
    )
