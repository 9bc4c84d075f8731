"""The process in which kernels run for the first time: `python -m actscale_fast.verification.worker`.

It reads a request from stdin and writes one line of JSON per event to stdout, so that the parent process knows what was
running when it crashed or hung. An illegal access ends this process and no other.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch

from ..ops import backends
from .case import Inputs
from .cases import CASES
from .checking import WrongError, check
from .speed import microseconds

#: Begins the lines that are events; libraries may print others.
MARK = "@@actscale "
#: Shown for a device without multiprocessors (a CPU).
NO_MULTIPROCESSORS = 4
SEED = 20241004


class Job(NamedTuple):
    """An op in a dtype on a backend."""

    backend: str
    op: str
    dtype: str


def main() -> int:
    """Work through the request on stdin; returns the process's exit status."""
    request = json.loads(sys.stdin.readline())
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for job in request["jobs"]:
        if not _verify(Job(*job), device):
            return 3  # after an error of the device nothing more can be trusted in this process
    for op, dtype, size, names in request["times"]:
        _emit("timing", op=op, dtype=dtype, size=size)
        times = microseconds(op, getattr(torch, dtype), size, names, device, quick=request["quick"])
        _emit("times", op=op, dtype=dtype, size=size, times=times)
    _emit("done")
    return 0


def _verify(job: Job, device: torch.device) -> bool:
    """Run the cases of one job until one fails; returns whether the process is still usable."""
    multiprocessors = NO_MULTIPROCESSORS
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    status, reason, cases, worst = "ok", "", 0, 0.0
    name = ""
    try:
        for case in CASES[job.op](Inputs(SEED, getattr(torch, job.dtype)), multiprocessors):
            name = case.name
            _emit("case", job=job, case=name)
            worst = max(worst, check(case, job.backend, device))  # type: ignore[arg-type]
            cases += 1
    except WrongError as error:
        status, reason = "wrong", f"{name}: {error}"
    except Exception as error:  # whatever a kernel or a compiler raises is a verdict
        status, reason = "failed", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    _emit("job", job=job, status=status, reason=reason, cases=cases, worst=round(worst, 3))
    return status != "failed" or device.type == "cpu"


def _emit(event: str, **fields: Any) -> None:
    print(MARK + json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    backends.set_backend("reference")  # until a case chooses another one
    sys.exit(main())
