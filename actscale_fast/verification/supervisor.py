"""Runs workers and survives them: a crash or a hang is a verdict with a reason, never the caller's process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .worker import MARK, NOT_TESTED, Job

#: The worker's command. Tests put a device that is wrong, hangs or crashes in its place.
WORKER = (sys.executable, "-P", "-m", "actscale_fast.verification.worker")
#: Seconds without an event after which a worker is taken for hung: for its start (torch, a driver), and for a case
#: (a kernel is compiled on the way). After so many seconds altogether nothing more is begun.
START_SECONDS, CASE_SECONDS, ALL_SECONDS = 120.0, 60.0, 900.0
#: Kernels of a backend that may hang before its other ones are not tried any more.
HANGS = 2


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job: "ok", "wrong", "failed", "crashed", "timed out" or "not tested", and the reason."""

    job: Job
    status: str
    reason: str = ""
    cases: int = 0
    worst: float = 0.0  # share of the allowed error that the worst case took


@dataclass
class Supervisor:
    """Sends requests to workers.

    Args:
        device: "cpu" or "cuda:0".
        quick: whether speed is measured briefly.
        progress: called with a line about what runs now and the number of jobs and timings that have just ended.
        environment: further environment variables of the workers.
        command, start_seconds, case_seconds, all_seconds: the worker and its time-outs.
    """

    device: str
    quick: bool = True
    progress: Callable[[str, int], None] = lambda text, ended: None
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = WORKER
    start_seconds: float = START_SECONDS
    case_seconds: float = CASE_SECONDS
    all_seconds: float = ALL_SECONDS

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.all_seconds

    def verify(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job; where a worker dies, the next one goes on after that job."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            job = jobs[len(outcomes)]
            hangs = sum(one.status == "timed out" and one.job.backend == job.backend for one in outcomes)
            if hangs >= HANGS:
                outcomes.append(Outcome(job, NOT_TESTED, f"{hangs} kernels of this backend have hung"))
            elif time.monotonic() > self._deadline:
                outcomes.append(Outcome(job, NOT_TESTED, f"verification took more than {self.all_seconds:.0f} s"))
            else:
                outcomes += self._verify_in_one_process(jobs[len(outcomes) :])
        return outcomes

    def _verify_in_one_process(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of the first jobs, at least of one; of all if the worker cannot start."""
        outcomes: list[Outcome] = []
        case = ""
        with self._worker(jobs=jobs) as worker:
            while len(outcomes) < len(jobs):
                job = jobs[len(outcomes)]
                event = worker.next_event(self.case_seconds if case else self.start_seconds)
                if event is None and not case:
                    reason = "the worker did not start: " + worker.end()[1]
                    return [*outcomes, *(Outcome(job, NOT_TESTED, reason) for job in jobs[len(outcomes) :])]
                if event is None:
                    status, reason = worker.end()
                    outcomes.append(Outcome(job, status, f"{case}: {reason}"))
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {status}", 1)
                    break
                if event["event"] == "case":
                    case = event["case"]
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {case}", 0)
                elif event["event"] == "job":
                    outcomes.append(Outcome(job, event["status"], event["reason"], event["cases"], event["worst"]))
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {event['status']}", 1)
                    if event["status"] in ("failed", NOT_TESTED):  # the worker may have ended itself
                        break
        return outcomes

    def time(self, requests: Sequence[tuple[str, str, int, Sequence[str]]]) -> list[dict[str, Any]]:
        """For each (op, dtype, size class, names) the times (`speed.microseconds`), or the `reason` for their lack."""
        results: list[dict[str, Any]] = []
        while len(results) < len(requests):
            with self._worker(times=requests[len(results) :]) as worker:
                limit = self.start_seconds
                while len(results) < len(requests):
                    op, dtype, size, _ = requests[len(results)]
                    wanted = {"op": op, "dtype": dtype, "size": size, "times": {}}
                    late = time.monotonic() > self._deadline
                    event = None if late else worker.next_event(limit)
                    limit = self.case_seconds
                    if event is None:
                        results.append(wanted | {"reason": "no time was left" if late else worker.end()[1]})
                        self.progress(f"timing {op} {dtype} was given up", 1)
                        break
                    if event["event"] == "timing":
                        self.progress(f"timing {op} {dtype}", 0)
                    elif event["event"] == "times":
                        results.append(wanted | {key: event[key] for key in ("times", "reason") if key in event})
                        self.progress(f"timed {op} {dtype}", 1)
        return results

    @contextlib.contextmanager
    def _worker(self, jobs: Sequence[Job] = (), times: Sequence[Any] = ()) -> Iterator[_Worker]:
        request = {"device": self.device, "jobs": list(jobs), "times": list(times), "quick": self.quick}
        with tempfile.TemporaryFile("w+") as messages:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self.environment}
            environment.pop("ACTSCALE_BACKEND", None)
            process = subprocess.Popen(
                [*self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True,
                errors="replace", env=environment, start_new_session=True,
            )  # fmt: skip
            worker = _Worker(process, messages)
            try:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it stays open: the worker ends when it closes
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                yield worker
            finally:
                worker.kill()


class _Worker:
    def __init__(self, process: subprocess.Popen[str], messages: Any) -> None:
        self._process, self._messages = process, messages
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._hung = False

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                begin = line.find(MARK)  # after what a library wrote without ending its line
                if begin >= 0:
                    with contextlib.suppress(json.JSONDecodeError):  # half a line of a process that was stopped
                        self._events.put(json.loads(line[begin + len(MARK) :]))
        finally:
            self._events.put(None)

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """None once the worker has ended, or said nothing for so long."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            self._hung = True
            return None

    def end(self) -> tuple[str, str]:
        """The status and the reason of a worker that sends no more events."""
        try:
            code = None if self._hung else self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            return "timed out", "no answer; the process was stopped"
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages.read().splitlines() if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return "crashed", f"{how}{f' ({lines[-1][:200]})' if lines else ''}"

    def kill(self) -> None:
        """Stop it and what it started (compilers), whatever it does; wait until it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None and not (stream is self._process.stdout and self._reader.is_alive()):
                    stream.close()
