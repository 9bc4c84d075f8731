"""Verification's worker on a faked device: one kernel of the C++ backend that is wrong, hangs, crashes, or worse.

Run as `python faked_worker.py FAULT`; without a fault it is the worker itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from actscale_fast.ops import cpu
from actscale_fast.verification import worker

right = cpu.scale_channels


def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return right(x, weight) * (1 + 1e-3)


def late(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Right for one value, so that an earlier case passes."""
    return right(x, weight) if x.numel() < 10 else wrong(x, weight)


def unsteady(x: torch.Tensor, weight: torch.Tensor, calls: list[int] = []) -> torch.Tensor:  # noqa: B006 (counts calls)
    """Other last bits in each run, all of them exact enough."""
    calls.append(0)
    y = right(x, weight)
    return y if len(calls) % 2 else y.nextafter(torch.full_like(y, torch.inf))


def outside(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Writes one element after its output."""
    y = right(x, weight)
    end = y.as_strided((1,), (1,), y.storage_offset() + y.numel())
    end.zero_()
    return y


def unwritten(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Leaves the last element as it was allocated."""
    y = x.new_empty(x.shape)
    y.view(-1)[:-1] = right(x, weight).reshape(-1)[:-1]
    return y


def overwriting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = right(x, weight)
    weight.zero_()
    return y


def hanging(*arguments: Any) -> torch.Tensor:
    time.sleep(1000)
    raise AssertionError


def crashing(*arguments: Any) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leaving(*arguments: Any) -> torch.Tensor:
    print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
    os._exit(77)


def raising(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


def chatty(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Right, but a library prints beside the events."""
    print("loading …")
    return right(x, weight)


def silent(*arguments: Any) -> torch.Tensor:
    """Ends in the middle, as if all were well."""
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        cpu.scale_channels = globals()[sys.argv[1]]
    sys.exit(worker.main())
