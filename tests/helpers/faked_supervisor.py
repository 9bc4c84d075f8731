"""A supervisor of verification without workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actscale_fast.verification.supervisor import Outcome, Supervisor
from actscale_fast.verification.worker import Job


@dataclass
class Faked(Supervisor):
    """Outcomes and times without a worker: kernels pass unless they are listed, and take 10 µs, plain PyTorch 20."""

    failing: Mapping[str, str] = ()  # type: ignore[assignment]
    times: Callable[[str, int, str], tuple[float, float, float]] = lambda op, size, name: (
        (20.0, 19.0, 21.0) if name == "reference" else (10.0, 9.0, 11.0)
    )

    untested: Sequence[str] = ()

    def verify(self, jobs: Sequence[Job]) -> list[Outcome]:
        failing = dict(self.failing)
        outcomes = []
        for job in jobs:
            status = "wrong" if job.op in failing else "not tested" if job.op in self.untested else "ok"
            outcomes.append(Outcome(job, status, failing.get(job.op, ""), cases=3 if status == "ok" else 0))
        return outcomes

    def time(self, requests: Sequence[tuple[str, str, int, Sequence[str]]]) -> list[dict[str, Any]]:
        made = []
        for op, dtype, size, names in requests:
            values = {
                name: dict(zip(("step", "low", "high"), self.times(op, size, name), strict=True)) for name in names
            }
            made.append({"op": op, "dtype": dtype, "size": size, "times": values})
        return made
