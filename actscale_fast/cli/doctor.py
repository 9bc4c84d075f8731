"""`actscale-fast doctor`: what was built, what runs on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch

from .._version import __version__
from ..ops import backends, device_identity, verdicts
from .output import print_table

_LIBRARIES = ("torch", "triton", "transformers", "safetensors", "numpy")


class Section(NamedTuple):
    """One part of the report: its name in the JSON document, and what is printed."""

    key: str
    title: str
    facts: Any
    rows: list[list[str]]


def doctor(options: argparse.Namespace) -> int:
    """Print the report, one table for each section; with --json, one object of the same content."""
    sections = [installed(), compiled(), devices(), available(), verified()]
    for section in sections:
        print_table(section.title, ("", ""), section.rows, right=False)
    options.result = {section.key: section.facts for section in sections}
    return 0


def installed() -> Section:
    """The versions of this package, of Python and of the libraries that the kernels depend on."""
    facts: dict[str, str | None] = {"actscale_fast": __version__, "python": platform.python_version()}
    facts["system"] = platform.platform()
    for name in _LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    facts["torch_cuda"] = torch.version.cuda
    rows = [[name, version or "not installed"] for name, version in facts.items() if name != "torch_cuda"]
    return Section("installed", "Installed", facts, [*rows, ["PyTorch's CUDA", torch.version.cuda or "none"]])


def compiled() -> Section:
    """What the extension holds: the compiler, the SIMD levels, and the CUDA architectures with those left out."""
    module = extension()
    if module is None:
        reason = backends.unavailable("cpu")
        return Section("compiled", "Compiled kernels", {"extension": None, "reason": reason}, [["extension", reason]])
    built = module.build_record()
    cuda = getattr(module, "cuda", None)
    facts = {
        "extension": str(module.__file__),
        "compiler": built["compiler"],
        "openmp": built["openmp"],
        "simd_built": list(built["simd_levels"]),
        "simd_levels": module.levels(),
        "simd_level": module.level(),
        "simd_by_verdict": module.levels_by_verdict(),
        "simd_dropped": built["dropped_levels"],
        "cuda_archs": [] if cuda is None else cuda.archs(),
        "cuda_toolkit": None if cuda is None else cuda.toolkit(),
        "cuda_dropped_archs": built["dropped_archs"],
        "cuda_reason": built["no_cuda"] or None,
    }
    notes = {name: " (not on this processor)" for name in built["simd_levels"] if name not in module.levels()}
    notes |= dict.fromkeys(module.levels_by_verdict(), " (only where a verdict has found it faster)")
    notes[module.level()] = " (in use)"
    kernels = f"none: {built['no_cuda']}"
    if cuda is not None:
        archs = ", ".join(f"sm_{arch}" for arch in cuda.archs()) or "architectures that nvcc did not report"
        kernels = f"{archs}, with PTX for later GPUs; CUDA {cuda.toolkit()} ({built['nvcc']})"
    rows = [
        ["extension", str(module.__file__)],
        ["compiler", built["compiler"]],
        ["threads", "OpenMP" if built["openmp"] else "one: the compiler has no OpenMP"],
        ["SIMD levels", ", ".join(name + notes.get(name, "") for name in built["simd_levels"])],
        *([f"left out: {level}", reason] for level, reason in built["dropped_levels"].items()),
        ["CUDA kernels", kernels],
        *([f"left out: sm_{arch}", reason] for arch, reason in built["dropped_archs"].items()),
    ]
    return Section("compiled", "Compiled kernels", facts, rows)


def devices() -> Section:
    """The processor and each GPU, and whether the CUDA kernels were built for it."""
    facts: dict[str, Any] = {
        "cpu": {"name": device_identity.processor_name(), "threads": torch.get_num_threads()},
        "driver": device_identity.driver_version(),
        "gpus": [gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
    }
    rows = [["CPU", facts["cpu"]["name"]], ["threads", str(facts["cpu"]["threads"])]]
    rows += [["NVIDIA driver", facts["driver"] or "none was found"]]
    for found in facts["gpus"]:
        about = f"{found['name']}, capability {found['capability']}, {found['multiprocessors']} multiprocessors"
        rows += [[f"GPU {found['index']}", f"{about}, {found['memory_gib']} GiB"]]
        rows += [["  CUDA kernels", found["cuda_reason"]]] if found["cuda_reason"] else []
    rows += [] if facts["gpus"] else [["GPU", "none that this build of PyTorch can use"]]
    return Section("devices", "Devices", facts, rows)


def available() -> Section:
    """Which backends can run here, why the others cannot, and which one a large call of `scale_heads` takes."""
    names = [name for name in get_args(backends.BackendName) if name != "auto"]
    reasons = {name: backends.unavailable(name) for name in names}
    chosen = backends.get_backend()
    taken = {}
    for device in _device_names():
        try:
            taken[device] = backends.resolve(torch.device(device), torch.float32)
        except RuntimeError as error:
            taken[device] = f"none: {error}"
    rows = [[name, f"cannot run: {reason}" if reason else "can run"] for name, reason in reasons.items()]
    rows += [["chosen (ACTSCALE_BACKEND)", chosen]]
    rows += [[f"used for float32 on {device} (scale_heads)", name] for device, name in taken.items()]
    facts = {"chosen": chosen, "unavailable": {n: r or None for n, r in reasons.items()}, "used_for_float32": taken}
    return Section("backends", "Backends", facts, rows)


def verified() -> Section:
    """For each device the verdict on its kernels: when it was made, and what did not pass."""
    facts: dict[str, Any] = {}
    rows = []
    for device in _device_names():
        verdict = verdicts.load(torch.device(device))
        facts[device] = verdict
        if verdict is None:
            rows += [[device, f"none yet; made by: actscale-fast verify --device {device}"]]
            continue
        failed = [one for one in verdict["outcomes"] if one["status"] != "ok"]
        passed = len(verdict["outcomes"]) - len(failed)
        rows += [[device, f"{passed} of {len(verdict['outcomes'])} kernels passed on {verdict['date']}"]]
        rows += [
            [f"  {one['backend']} {one['op']} {one['dtype']}", f"{one['status']}: {one['reason']}"] for one in failed
        ]
    return Section("verdicts", "Verdicts on kernels", facts, rows)


def _device_names() -> list[str]:
    """The CPU and the GPUs that PyTorch can use; with a driver that is too old it counts GPUs and uses none."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def extension() -> ModuleType | None:
    """The compiled extension, or None where it was not built."""
    return importlib.import_module("actscale_fast.ops._C") if backends.has_extension() else None


def gpu(index: int) -> dict[str, Any]:
    """What PyTorch says of a GPU, and why the CUDA kernels of this build have no code for it, if so."""
    found = torch.cuda.get_device_properties(index)
    kernels = getattr(extension(), "cuda", None)
    return {
        "index": index,
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda_reason": (kernels.unavailable_on(index) or None) if kernels is not None else None,
    }
