"""A kernel that is wrong, hangs or crashes gets a verdict with a reason, and the other kernels get theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import faked_worker
import pytest
import torch

from actscale_fast.ops import backends, cpu
from actscale_fast.verification import worker
from actscale_fast.verification.supervisor import Supervisor
from actscale_fast.verification.worker import Job

WORKER = Path(faked_worker.__file__)
JOBS = [Job("cpu", "scale_channels", "float32"), Job("cpu", "proximal_adam_", "float32")]

pytestmark = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="needs the C++ kernels")


def supervised(fault: str, **options: Any) -> Supervisor:
    return Supervisor("cpu", command=(sys.executable, "-P", str(WORKER), *fault.split()), **options)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "one value: result 0 is off by "),
        ("late", "odd: result 0 is off by "),
        ("unsteady", "one value: a second run differs: tensor 0"),
        ("outside", "one value: 4 bytes outside its tensors were written"),
        ("unwritten", "one value: result 0 is off by inf"),
        ("overwriting", "one value: arguments were changed: tensor 1"),
    ],
)
def test_a_wrong_kernel_is_told_by_the_case_and_by_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, reason: str
) -> None:
    monkeypatch.setattr(cpu, "scale_channels", getattr(faked_worker, fault))
    assert worker._verify(JOBS[0], torch.device("cpu")) == "wrong"
    event = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(worker.MARK))
    assert (event["event"], event["status"]) == ("job", "wrong"), event
    assert event["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("wrong", "wrong", "one value: result 0 is off by "),
        ("crashing", "crashed", "one value: signal SIGSEGV"),
        ("leaving", "crashed", "one value: exit status 77 (CUDA error: an illegal memory access was encountered)"),
        ("raising", "failed", "one value: RuntimeError: no kernel image is available"),
    ],
)
def test_a_fault_is_a_verdict_with_a_reason_and_the_next_kernel_is_still_tested(
    fault: str, status: str, reason: str
) -> None:
    broken, good = supervised(fault).verify(JOBS)
    assert (broken.job, broken.status) == (JOBS[0], status)
    assert broken.reason.startswith(reason)
    assert (good.job, good.status, good.reason) == (JOBS[1], "ok", "")
    assert good.cases == 6


def test_a_worker_that_ends_in_the_middle_as_if_all_were_well_is_a_crash() -> None:
    (broken,) = supervised("silent").verify(JOBS[:1])
    assert (broken.status, broken.reason) == ("crashed", "one value: exit status 0")


def test_a_hang_is_stopped_after_the_time_out_and_the_next_kernel_is_still_tested() -> None:
    broken, good = supervised("hanging", case_seconds=5.0).verify(JOBS)
    assert (broken.status, broken.reason) == ("timed out", "one value: no answer; the process was stopped")
    assert good.status == "ok"


def test_what_libraries_print_is_no_event() -> None:
    assert [outcome.status for outcome in supervised("chatty").verify(JOBS[:1])] == ["ok"]


def test_a_worker_that_cannot_start_is_a_verdict_on_each_kernel() -> None:
    broken = Supervisor("cpu", command=(sys.executable, "-c", "raise SystemExit('no driver')")).verify(JOBS)
    reason = "the worker did not start: exit status 1 (no driver)"
    assert [(one.status, one.reason) for one in broken] == [("not tested", reason)] * 2


def test_after_two_hangs_of_a_backend_its_other_kernels_are_not_tried() -> None:
    jobs = [JOBS[0]._replace(dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    outcomes = supervised("hanging", case_seconds=4.0).verify(jobs)
    assert [one.status for one in outcomes] == ["timed out", "timed out", "not tested"]
    assert outcomes[2].reason == "2 kernels of this backend have hung"


def test_nothing_is_begun_after_the_time_for_all() -> None:
    outcomes = supervised("", all_seconds=-1.0).verify(JOBS)
    assert [(one.status, one.reason) for one in outcomes] == [("not tested", "verification took more than -1 s")] * 2


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    command = [sys.executable, "-P", str(WORKER), "hanging"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"device": "cpu", "jobs": JOBS, "times": [], "quick": True}) + "\n")
    process.stdin.flush()
    assert "one value" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(30) == 4
    process.stdout.close()


@pytest.mark.parametrize("columns", [slice(-3, None), slice(1024, 1032)])
def test_wrong_columns_of_a_long_row_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: slice
) -> None:
    """A forgotten tail, or one vector left out, of fifty thousand columns."""
    right = cpu.intervention_loss

    def wrong(*arguments: Any, **options: Any) -> Any:
        results = right(*arguments, **options)
        if results[2].numel() and results[2].shape[1] > 20000:
            results[2][:, columns] = 0.0
        return results

    monkeypatch.setattr(cpu, "intervention_loss", wrong)
    assert worker._verify(Job("cpu", "intervention_loss", "bfloat16"), torch.device("cpu")) == "wrong"
    event = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(worker.MARK))
    assert event["reason"].startswith("width 32003")
