"""The instruction sets of the C++ kernels here: which are verified, and which must be faster to be used."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence

from ..ops import backends, device_identity, verdicts
from .supervisor import Outcome, Supervisor
from .worker import Job

#: What levels `by_verdict` do otherwise than the level in use.
MEASURED_JOBS = {
    "avx512_bf16": (Job("cpu", "linear_softmax", "bfloat16"),),
    "avx512_amx": tuple(Job("cpu", "linear_softmax", dtype) for dtype in ("float32", "bfloat16", "float16")),
}


def lower() -> list[str]:
    """The instruction sets of the C++ kernels here, except the one in use and those `by_verdict`."""
    if not backends.has_extension():
        return []
    others = {device_identity.cpu_level(), *by_verdict()}
    return [level for level in importlib.import_module("actscale_fast.ops._C").levels() if level not in others]


def by_verdict() -> list[str]:
    """Instruction sets that are used only where they were found right and faster; none where one is forced."""
    if not backends.has_extension() or "ACTSCALE_CPU_LEVEL" in os.environ:
        return []
    return list(importlib.import_module("actscale_fast.ops._C").levels_by_verdict())


def at_level(supervisor: Supervisor, level: str) -> Supervisor:
    """The supervisor of workers that use this level."""
    environment = {**supervisor.environment, "ACTSCALE_CPU_LEVEL": level}
    return dataclasses.replace(supervisor, environment=environment)


def verified_at(supervisor: Supervisor, level: str, jobs: Sequence[Job]) -> list[Outcome]:
    """Outcomes of the jobs at a level, whose name is added to the backend's."""
    return [
        dataclasses.replace(one, job=one.job._replace(backend=f"{one.job.backend} {level}"))
        for one in at_level(supervisor, level).verify(jobs)
    ]


def is_faster(by_size: Sequence[dict[str, dict[str, float]]], name: str) -> bool:
    """Whether a level is faster than the one in use, beyond their spread, at the large size, and slower at none."""
    if not all({"cpu", name} <= set(times) for times in by_size):
        return False
    slower = any(times["cpu"]["high"] < times[name]["low"] for times in by_size)
    return not slower and by_size[verdicts.LARGE][name]["high"] < by_size[verdicts.LARGE]["cpu"]["low"]
