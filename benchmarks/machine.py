"""Where a result comes from: processor, threads, versions, date, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from actscale_fast.ops import verdicts
from actscale_fast.ops.device_identity import cpu_level, processor_name

ROOT = Path(__file__).resolve().parent.parent


def slug(device: torch.device, threads: int) -> str:
    """The machine's part of a result's file name."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()} {threads} threads" if threads > 1 else f"{processor_name()} 1 thread"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, object]:
    """Everything that a figure depends on, as it goes into the JSON."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "transformers", "actscale-fast", "liger-kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "kernel_level": kernel_levels(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def kernel_levels() -> str | None:
    """The instructions of the C++ kernels, with those that a verdict chooses for some op."""
    chosen = {choice.level for choice in (verdicts.choices("cpu", None) or {}).values() if choice.level}
    return ", ".join([level, *sorted(chosen)]) if (level := cpu_level()) else None


def commit() -> str:
    """The short commit, "+" where tracked files differ from it, "" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        return (
            found + "+"
            if found and git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
            else found
        )
    except FileNotFoundError:
        return ""
