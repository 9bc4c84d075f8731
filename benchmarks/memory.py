"""Peak memory of one call, above what was there before it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines are not for the reader
from torch.profiler import ProfilerActivity, profile

from actscale_fast.ops import backends

from .case import Call


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    if backends.unavailable("cpu"):
        yield
        return
    # The package hands on the function of that name.
    intervention_loss: Any = importlib.import_module("actscale_fast.ops.cpu.intervention_loss")

    before, intervention_loss.KEPT_UP_TO = intervention_loss.KEPT_UP_TO, 0
    try:
        yield
    finally:
        intervention_loss.KEPT_UP_TO = before


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that PyTorch's allocator held during one call beyond what it held before, results included.

    On a CPU it is read from the profiler's memory events, on a GPU from the allocator's own statistics. Neither sees
    what a C++ kernel allocates for itself: a few rows, or up to 64 MiB of partial sums for the losses from hidden
    states. A kept gradient would not be seen either: for this call every gradient comes from PyTorch.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with _nothing_kept(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = call()
    del results
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
