"""`actscale-fast bench`: hand over to the benchmarks of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import actscale_fast


def bench(arguments: Sequence[str]) -> int:
    """Run `python -m benchmarks` in the checkout with these arguments and return its exit status.

    Raises:
        FileNotFoundError: there is no folder `benchmarks` beside the package nor in the current folder.
    """
    package = Path(actscale_fast.__file__).resolve().parent.parent
    for root in (package, Path.cwd()):
        if (root / "benchmarks" / "__main__.py").is_file():
            words = [word for position, word in enumerate(arguments) if word != "--" or position]
            return subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=root).returncode
    raise FileNotFoundError(
        f"no folder benchmarks in {package} or {Path.cwd()}: it is not part of the installed package; "
        "run this command in a checkout of the source"
    )
