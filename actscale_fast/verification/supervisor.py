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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .worker import MARK, Job

#: The worker's command. Tests put a device that is wrong, hangs or crashes in its place.
WORKER = (sys.executable, "-P", "-m", "actscale_fast.verification.worker")
#: Seconds without an event after which a worker is taken for hung: for its start (torch, a driver), and for a case
#: (a kernel is compiled on the way).
START_SECONDS, CASE_SECONDS = 120.0, 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a job: "ok", "wrong", "failed", "crashed" or "timed out", and the reason."""

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
        command, start_seconds, case_seconds: the worker and its time-outs.
    """

    device: str
    quick: bool = True
    progress: Callable[[str, int], None] = lambda text, ended: None
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = WORKER
    start_seconds: float = START_SECONDS
    case_seconds: float = CASE_SECONDS

    def verify(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job; where a worker dies, the next one goes on after that job."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            outcomes += self._verify_in_one_process(jobs[len(outcomes) :])
        return outcomes

    def _verify_in_one_process(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of the first jobs, at least of one."""
        outcomes: list[Outcome] = []
        case = "start"
        with self._worker(jobs=jobs) as worker:
            while len(outcomes) < len(jobs):
                job = jobs[len(outcomes)]
                event = worker.next_event(self.start_seconds if case == "start" else self.case_seconds)
                if event is None:
                    outcomes.append(Outcome(job, *worker.end(case)))
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {outcomes[-1].status}", 1)
                    break
                if event["event"] == "case":
                    case = event["case"]
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {case}", 0)
                elif event["event"] == "job":
                    outcomes.append(Outcome(job, event["status"], event["reason"], event["cases"], event["worst"]))
                    self.progress(f"{job.op} {job.dtype} on {job.backend}: {event['status']}", 1)
                    if event["status"] == "failed":  # the worker may have ended itself
                        break
        return outcomes

    def time(self, requests: Sequence[tuple[str, str, int, Sequence[str]]]) -> list[dict[str, Any]]:
        """Times (see `speed.microseconds`) of (op, dtype, size class, names); what a worker dies at is left out."""
        results: list[dict[str, Any]] = []
        done = 0
        while done < len(requests):
            with self._worker(times=requests[done:]) as worker:
                limit = self.start_seconds
                while done < len(requests):
                    event = worker.next_event(limit)
                    limit = self.case_seconds
                    if event is None:
                        done += 1
                        self.progress("a timing was given up", 1)
                        break
                    if event["event"] == "timing":
                        self.progress(f"timing {event['op']} {event['dtype']}", 0)
                    elif event["event"] == "times":
                        results.append({key: event[key] for key in ("op", "dtype", "size", "times")})
                        done += 1
                        self.progress(f"timed {event['op']} {event['dtype']}", 1)
        return results

    @contextlib.contextmanager
    def _worker(self, jobs: Sequence[Job] = (), times: Sequence[Any] = ()) -> Iterator[_Worker]:
        request = {"device": self.device, "jobs": list(jobs), "times": list(times), "quick": self.quick}
        with tempfile.TemporaryFile("w+") as messages:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self.environment}
            environment.pop("ACTSCALE_BACKEND", None)
            process = subprocess.Popen(
                [*self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True,
                env=environment,
            )  # fmt: skip
            worker = _Worker(process, messages)
            try:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.close()
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
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._events.put(json.loads(line[len(MARK) :]))
        self._events.put(None)

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """None once the worker has ended, or said nothing for so long."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            self._hung = True
            return None

    def end(self, case: str) -> tuple[str, str]:
        """The status and the reason of a worker that sends no more events."""
        if self._hung:
            return "timed out", f"{case}: no answer; the process was stopped"
        code = self._process.wait(10)
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages.read().splitlines() if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return "crashed", f"{case}: {how}{f' ({lines[-1][:200]})' if lines else ''}"

    def kill(self) -> None:
        """Stop it, whatever it does; wait until it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()
