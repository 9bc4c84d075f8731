"""The instruction sets of the C++ kernels here: which are verified, and which must be faster to be used."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence

from ..ops import backends, device_identity, verdicts
from .supervisor import Outcome, Supervisor
from .worker import Job

#: What these levels do otherwise than `avx512`.
OWN_JOBS = {
    "avx512_bf16": (Job("cpu", "linear_softmax", "bfloat16"),),
    "avx512_amx": tuple(Job("cpu", "linear_softmax", dtype) for dtype in ("float32", "bfloat16", "float16")),
}


def others() -> list[str]:
    """The instruction sets of the C++ kernels here, except the one in use and those `by_verdict`."""
    if not backends.has_extension():
        return []
    known = importlib.import_module("actscale_fast.ops._C").levels()
    return [level for level in known if level not in {device_identity.cpu_level(), *by_verdict()}]


def jobs_at(level: str, jobs: Sequence[Job]) -> list[Job]:
    """Of these jobs, those with kernels of the level's own."""
    return [job for job in jobs if level not in OWN_JOBS or job in OWN_JOBS[level]]


def by_verdict() -> list[str]:
    """Instruction sets that are used only where they were found right and faster; none where one is forced."""
    return [] if "ACTSCALE_CPU_LEVEL" in os.environ else device_identity.levels_by_verdict()


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
