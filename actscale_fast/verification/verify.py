"""`verify_kernels`: test every kernel on a device, time the backends, and keep the verdict for `auto`."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._tables import Readable
from ..ops import backends, device_identity, verdicts
from . import levels
from .speed import COMPILED
from .supervisor import Outcome, Supervisor
from .worker import NOT_TESTED, Job

DTYPES = ("float32", "bfloat16", "float16")

Passed = set[tuple[str, str, str]]  # op, dtype, and a backend, alone or with a level


@dataclass(frozen=True, repr=False)
class Verification(Readable):
    """What `verify_kernels` found on one device.

    Attributes:
        verdict: the verdict as it was saved: device, date, outcomes, times and choices.
        path: its file.
    """

    verdict: dict[str, Any]
    path: str

    @property
    def ok(self) -> bool:
        """Whether every kernel that can run on this device passed every case."""
        return all(outcome["status"] == "ok" for outcome in self.verdict["outcomes"])

    @property
    def failures(self) -> list[str]:
        """One line per kernel that did not pass: backend, op, dtype, status and reason."""
        return [
            f"{one['backend']} {one['op']} {one['dtype']}: {one['status']} ({one['reason']})"
            for one in self.verdict["outcomes"]
            if one["status"] != "ok"
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Per op and dtype: the outcome, with its number of cases, of every backend that may be used, and the choice by
        size of the call."""
        outcomes = {(one["op"], one["dtype"], one["backend"]): one for one in self.verdict["outcomes"]}
        names = [name for name in self._names if name not in self._other_levels]
        rows = []
        for op, by_dtype in self.verdict["choices"].items():
            for dtype, choice in by_dtype.items():
                found = [_shown(outcomes.get((op, dtype, name))) for name in names]
                used = {"cpu": f"cpu {choice['level']}"} if "level" in choice else {}
                fastest = [choice["fastest"][size] for size in verdicts.SIZES]
                rows.append([op, dtype, *found, *(used.get(name, name) for name in fastest)])
        return ["op", "dtype", *names, *verdicts.SIZES], rows

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(one["backend"] for one in self.verdict["outcomes"]))

    @property
    def _other_levels(self) -> list[str]:
        """Instruction sets that were tested, but are neither in use nor timed against the one that is."""
        timed = {name for one in self.verdict["times"] for name in one["times"]}
        return [name for name in self._names if " " in name and name not in timed]

    def _heading(self) -> str:
        device = self.verdict["device"]
        keys = ("instructions", "capability", "driver", "torch", "triton", "cuda")
        facts = [f"{key} {device[key]}" for key in keys if device.get(key)]
        return f"Kernels on {device['name']} ({', '.join(facts)}), verified on {self.verdict['date']}"

    def _notes(self) -> list[str]:
        passed = sum(one["status"] == "ok" for one in self.verdict["outcomes"])
        counts = f"{passed} of {len(self.verdict['outcomes'])} passed, in {self.verdict['seconds']:.0f} s"
        return [
            f'{counts}; the last columns show what "auto" uses for small, medium and large calls.',
            *([f"Also tested, and not used here: {', '.join(self._other_levels)}."] if self._other_levels else []),
            *self.failures,
            *(f"not timed: {one['op']} {one['dtype']}, {one['size']} ({one['reason']})" for one in self._untimed),
        ]

    @property
    def _untimed(self) -> list[dict[str, Any]]:
        return [one for one in self.verdict["times"] if "reason" in one]


def _shown(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return ""
    return f"ok, {outcome['cases']} cases" if outcome["status"] == "ok" else str(outcome["status"])


def verify_kernels(
    device: torch.device | str | None = None,
    quick: bool = True,
    *,
    progress: Callable[[float, str], None] | None = None,
    supervisor: Supervisor | None = None,
) -> Verification:
    """Test every kernel that can run on a device, time the backends, and let "auto" use what passed and is fastest.

    The kernels run in processes of their own: one that crashes or hangs fails with that reason. The verdict is kept in
    `$ACTSCALE_VERDICTS` (default: `verdicts` in the cache folder) and holds for this device, driver, PyTorch, Triton
    and build of the kernels; this process uses it from now on. An op's results are accepted if their error against
    float64 is at most twice that of plain PyTorch, beside rounding.

    Args:
        device: "cpu", "cuda", "cuda:1", …; default: the current GPU, or the CPU if there is none.
        quick: measure speed briefly and without torch.compile (a minute or two on a CPU).
        progress: called with the share that is done and a line about what runs now.
        supervisor: how workers are started; for tests.

    Returns:
        The outcome of every kernel, with its reason, and the choices.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
        RuntimeError: no such device here.
        OSError: the verdict cannot be written.

    Example:
        >>> print(af.verify_kernels())
    """
    chosen = chosen_device(device)
    with verdicts.locked(device_identity.identity(chosen)):
        return verify_locked(chosen, quick, progress, supervisor)


def verify_locked(
    chosen: torch.device,
    quick: bool,
    progress: Callable[[float, str], None] | None,
    supervisor: Supervisor | None = None,
) -> Verification:
    """`verify_kernels` by the process that holds the device's lock."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    supervisor = supervisor or Supervisor(str(chosen), quick=quick, environment=threads)
    started = time.perf_counter()
    jobs = [Job(name, op, dtype) for name in kernel_backends(chosen) for op, dtype in ops_and_dtypes()]
    others, eligible = (levels.others(), levels.by_verdict()) if chosen.type == "cpu" else ([], [])
    at_level = {level: levels.jobs_at(level, jobs) for level in (*others, *eligible)}
    if progress is not None:
        timings = len(ops_and_dtypes()) * len(verdicts.SIZES)
        total = len(jobs) + sum(map(len, at_level.values())) + timings
        supervisor = dataclasses.replace(supervisor, progress=_Share(progress, total))
    if eligible:  # "cpu" is the level in use, whatever an earlier verdict says
        supervisor = levels.at_level(supervisor, str(device_identity.cpu_level()))
    outcomes = supervisor.verify(jobs)
    passed = {(one.job.op, one.job.dtype, one.job.backend) for one in outcomes if one.status == "ok"}
    at_levels = [one for level in eligible for one in levels.verified_at(supervisor, level, at_level[level])]
    faster = {(one.job.op, one.job.dtype, one.job.backend) for one in at_levels if one.status == "ok"}
    times = _merged(supervisor.time(_times_wanted(passed, faster, compiled=not quick)))
    outcomes += at_levels
    outcomes += [one for level in others for one in levels.verified_at(supervisor, level, at_level[level])]
    verdict = {
        "format": verdicts.FORMAT,
        "device": device_identity.identity(chosen),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        "complete": all(one.status != NOT_TESTED for one in outcomes),
        "outcomes": [_entry(one) for one in outcomes],
        "times": [{**one, "size": verdicts.SIZES[one["size"]]} for one in times],
        "choices": _choices(passed, times, faster),
    }
    path = verdicts.save(verdict)
    backends.reconsider()
    return Verification(verdict, str(path))


class _Share:
    """Turns the number of jobs that have ended into the share of all."""

    def __init__(self, progress: Callable[[float, str], None], total: int) -> None:
        self._progress, self._total, self._ended = progress, max(total, 1), 0

    def __call__(self, text: str, ended: int) -> None:
        self._ended += ended
        self._progress(min(1.0, self._ended / self._total), text)


def kernel_backends(device: torch.device) -> list[backends.BackendName]:
    """The compiled backends that can run on this device."""
    names: tuple[backends.BackendName, ...] = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    return [name for name in names if not backends.unavailable_on(name, device.type, device.index)]


def ops_and_dtypes() -> list[tuple[str, str]]:
    """Every op with the dtypes that its kernels take."""
    return [(op, dtype) for op in verdicts.OPS for dtype in (DTYPES if op != "proximal_adam_" else DTYPES[:1])]


def chosen_device(device: torch.device | str | None) -> torch.device:
    """The device meant, with its index; default: the current GPU, or the CPU if there is none.

    Raises:
        ValueError: neither a CPU nor a CUDA device.
        RuntimeError: no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(chosen)!r}, expected 'cpu' or a CUDA device such as 'cuda:0'")
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device: got {str(chosen)!r}, but PyTorch finds no GPU here")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"device: got {str(chosen)!r}, but there are {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", index)


def _times_wanted(passed: Passed, at_levels: Passed, *, compiled: bool) -> list[tuple[str, str, int, Sequence[str]]]:
    wanted: list[tuple[str, str, int, Sequence[str]]] = []
    for op, dtype in ops_and_dtypes():
        kernels = [name for one_op, one_dtype, name in sorted(passed | at_levels) if (one_op, one_dtype) == (op, dtype)]
        sizes = range(len(verdicts.SIZES)) if kernels else ()
        wanted += [(op, dtype, size, ["reference", *kernels]) for size in sizes]
        if compiled and op != "proximal_adam_":  # by itself: what a compiler cannot do must not cost the others' times
            wanted += [(op, dtype, size, [COMPILED]) for size in sizes]
    return wanted


def _merged(times: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per op, dtype and size, with the times of all its requests."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in times:
        entry = found.setdefault((one["op"], one["dtype"], one["size"]), one | {"times": {}})
        entry["times"].update(one["times"])
        entry.update({"reason": one["reason"]} if "reason" in one else {})
    return list(found.values())


def _choices(passed: Passed, times: Sequence[dict[str, Any]], at_levels: Passed) -> dict[str, dict[str, Any]]:
    """The fastest backend per op, dtype and size; a kernel without times (its worker died) is not chosen.

    Plain PyTorch is preferred to a kernel only where it is faster beyond the spread of both. `at_levels`: backends and
    levels that passed and need to be faster, as `levels.is_faster` says.
    """
    measured = {(one["op"], one["dtype"], one["size"]): one["times"] for one in times}
    choices: dict[str, dict[str, Any]] = {}
    for op, dtype in ops_and_dtypes():
        fastest = {}
        kernels = sorted(name for one_op, one_dtype, name in passed if (one_op, one_dtype) == (op, dtype))
        by_size = [measured.get((op, dtype, index), {}) for index in range(len(verdicts.SIZES))]
        candidates = [name for one_op, one_dtype, name in at_levels if (one_op, one_dtype) == (op, dtype)]
        level = next((name for name in candidates if "cpu" in kernels and levels.is_faster(by_size, name)), None)
        for found, size in zip(by_size, verdicts.SIZES, strict=True):
            found = found | {"cpu": found[level]} if level else found
            timed = [name for name in kernels if name in found]
            best = min(timed, key=lambda name: found[name]["step"]) if timed else "reference"
            if timed and found["reference"]["high"] < found[best]["low"]:
                best = "reference"
            fastest[size] = best
        choices.setdefault(op, {})[dtype] = {"fastest": fastest, "passed": kernels}
        if level:
            choices[op][dtype]["level"] = level.partition(" ")[2]
    return choices


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "backend": outcome.job.backend, "op": outcome.job.op, "dtype": outcome.job.dtype, "status": outcome.status,
        "reason": outcome.reason, "cases": outcome.cases, "worst": outcome.worst,
    }  # fmt: skip
