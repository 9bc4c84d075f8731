"""The folder for what is made once per machine: the converted demo model and the verdicts on kernels."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$ACTSCALE_CACHE` if it is set, else `~/.cache/actscale_fast`."""
    chosen = os.environ.get("ACTSCALE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "actscale_fast"
