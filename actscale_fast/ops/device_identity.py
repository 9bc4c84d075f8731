"""What a verdict on kernels depends on: the device, its driver, the libraries, and the kernels themselves."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

_OPS = Path(__file__).resolve().parent
_CASES = _OPS.parent / "verification" / "cases"
_DRIVER = Path("/proc/driver/nvidia/version")


def identity(device: torch.device) -> dict[str, Any]:
    """The facts that a verdict on this device's kernels holds for; it is void when one of them changes.

    Raises:
        ValueError: neither a CPU nor a CUDA device.
    """
    of_device: dict[str, Any]
    if device.type == "cpu":
        of_device = {"name": processor_name(), "instructions": cpu_level(), "by_verdict": levels_by_verdict()}
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        of_device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "mig": "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", "") or " MIG " in f" {properties.name} ",
            "driver": driver_version(),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    else:
        raise ValueError(f"device: got {device}, expected a CPU or a CUDA device")
    versions = {"torch": torch.__version__, "triton": _version("triton")}
    return {"type": device.type, **of_device, **versions, "kernels": kernels_digest()}


def digest(facts: dict[str, Any]) -> str:
    """A short name for these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


@functools.cache
def kernels_digest() -> str:
    """SHA-256 over the kernels and what they were tested with: the files of ops, which include Triton's kernels, the
    compiled extension, and the cases of verification.
    """
    found = hashlib.sha256()
    files = [*_OPS.rglob("*.py"), *_OPS.glob("_C.*"), *_CASES.glob("*.py")]
    for path in sorted(path for path in files if path.suffix in (".py", ".so", ".pyd")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:20]


def processor_name() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_level() -> str | None:
    """Which instructions the C++ kernels use; None where they are not built."""
    if importlib.util.find_spec("actscale_fast.ops._C") is None:
        return None
    # The variable is applied when the backend is imported, which may be later.
    return os.environ.get("ACTSCALE_CPU_LEVEL") or str(importlib.import_module("actscale_fast.ops._C").level())


def levels_by_verdict() -> list[str]:
    """Instructions of the C++ kernels here that a verdict may choose."""
    if importlib.util.find_spec("actscale_fast.ops._C") is None:
        return []
    return list(importlib.import_module("actscale_fast.ops._C").levels_by_verdict())


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where the system does not tell it in this way."""
    try:
        line = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[:1].isdigit()), line)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
