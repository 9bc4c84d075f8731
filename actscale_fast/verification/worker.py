"""The process in which kernels run for the first time: `python -m actscale_fast.verification.worker`.

It reads a request from stdin and writes one line of JSON per event to stdout, so that the parent process knows what was
running when it crashed or hung. An illegal access ends this process and no other.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from typing import Any, NamedTuple

import torch

from ..ops import backends
from .case import Inputs
from .cases import CASES
from .checking import WrongError, check
from .speed import microseconds

#: Begins the lines that are events; libraries may print others.
MARK = "@@actscale "
NOT_TESTED = "not tested"
#: Assumed for a CPU.
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
    if request.get("watched", True):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    right = True
    for job in request["jobs"]:
        status = _verify(Job(*job), device, request.get("cases"))
        right = right and status == "ok"
        if status in ("failed", NOT_TESTED) and device.type != "cpu":
            return 3  # after an error of the device nothing more can be trusted in this process
    for op, dtype, size, names in request["times"]:
        _emit("timing", op=op, dtype=dtype, size=size)
        try:
            times = microseconds(op, getattr(torch, dtype), size, names, device, quick=request["quick"])
        except Exception as error:  # a compiler's, or too little memory
            _emit("times", times={}, reason=_sentence(error))
        else:
            _emit("times", times=times)
    _emit("done")
    return 0 if right else 1


def _end_with_parent() -> None:
    """End this process, whatever a kernel does, when its parent is gone: stdin closes then."""
    sys.stdin.read()
    os._exit(4)


def _verify(job: Job, device: torch.device, most: int | None = None) -> str:
    """Run the cases of one job (at most so many) until one fails; returns the status."""
    multiprocessors = NO_MULTIPROCESSORS
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    status, reason, cases, worst = "ok", "", 0, 0.0
    name = ""
    try:
        made = CASES[job.op](Inputs(SEED, getattr(torch, job.dtype)), multiprocessors)
        for case in itertools.islice(made, most):
            name = case.name
            _emit("case", job=job, case=name)
            worst = max(worst, check(case, job.backend, device))  # type: ignore[arg-type]
            cases += 1
    except WrongError as error:
        status, reason = "wrong", f"{name}: {error}"
    except torch.OutOfMemoryError as error:  # of the user's model beside it, perhaps
        status, reason = NOT_TESTED, f"{name}: {_sentence(error)}"
    except Exception as error:  # whatever a kernel or a compiler raises is a verdict
        status, reason = "failed", f"{name}: {_sentence(error)}"
    _emit("job", job=job, status=status, reason=reason, cases=cases, worst=round(worst, 3))
    return status


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _emit(event: str, **fields: Any) -> None:
    print(MARK + json.dumps({"event": event, **fields}), flush=True)


if __name__ == "__main__":
    backends.set_backend("reference")  # until a case chooses another one
    sys.exit(main())
