"""`actscale-fast verify`, and the kernels of this processor under it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faked_supervisor import Faked

import actscale_fast as af
from actscale_fast.cli import main, verify
from actscale_fast.ops import backends, verdicts
from actscale_fast.verification import levels
from actscale_fast.verification.speed import COMPILED
from actscale_fast.verification.supervisor import Supervisor
from actscale_fast.verification.verify import ops_and_dtypes
from actscale_fast.verification.worker import Job

pytestmark = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACTSCALE_VERDICTS", str(tmp_path / "verdicts"))
    yield
    backends.reconsider()


def _with_outcomes(monkeypatch: pytest.MonkeyPatch, **failing: str) -> None:
    def faked(device: Any, **options: Any) -> Any:
        return af.verify_kernels(device, supervisor=Faked("cpu", failing=failing))

    monkeypatch.setattr(verify, "verify_kernels", faked)


def test_the_command_prints_every_kernel_the_choice_and_the_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_outcomes(monkeypatch)
    assert main(["verify", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for text in ("Kernels on", "scale_heads", "ok, 3 cases", "small", "µs per call", "10 (9–11)", "verdict: "):
        assert text in printed


def test_levels_that_are_not_used_here_have_a_line_and_no_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = levels.others()
    if not others:
        pytest.skip("this processor has one level")
    _with_outcomes(monkeypatch)
    assert main(["verify", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"Also tested, and not used here: {', '.join(f'cpu {level}' for level in others)}." in lines
    (header,) = (line for line in lines if line.split()[:3] == ["op", "dtype", "cpu"])
    assert not any(level in header for level in others)


def test_only_what_a_level_does_by_itself_is_tested_at_it() -> None:
    jobs = [Job("cpu", op, dtype) for op in ("scale_heads", "linear_softmax") for dtype in ("float32", "bfloat16")]
    assert levels.jobs_at("avx2", jobs) == jobs
    assert levels.jobs_at("avx512_bf16", jobs) == [Job("cpu", "linear_softmax", "bfloat16")]
    assert levels.jobs_at("avx512_amx", jobs) == jobs[2:]


def test_a_kernel_that_did_not_pass_is_told_with_its_reason_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_outcomes(monkeypatch, scale_heads="odd: result 1 is off by 0.1")
    assert main(["verify", "--device", "cpu", "--quiet"]) == 1
    assert "cpu scale_heads bfloat16: wrong (odd: result 1 is off by 0.1)" in capsys.readouterr().out


def test_the_report_is_the_verdict_as_json_and_without_one_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--report", "--device", "cpu"]) == 1
    assert "actscale-fast: error: there is no verdict for cpu with these versions in" in capsys.readouterr().err
    _with_outcomes(monkeypatch)
    main(["verify", "--device", "cpu"])
    capsys.readouterr()
    assert main(["verify", "--report", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == verdicts.FORMAT
    assert {"name", "instructions", "torch", "kernels"} <= set(report["device"])


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "meta"]) == 1
    assert capsys.readouterr().err.startswith(
        "actscale-fast: error: device: got 'meta', expected 'cpu' or a CUDA device"
    )


@pytest.mark.slow
def test_every_cpp_kernel_passes_every_case_in_a_worker_and_is_timed() -> None:
    supervisor = Supervisor("cpu")
    outcomes = supervisor.verify([Job("cpu", op, dtype) for op, dtype in ops_and_dtypes()])
    assert [(one.job, one.status, one.reason) for one in outcomes if one.status != "ok"] == []
    assert sum(one.cases for one in outcomes) > 200
    (timed,) = supervisor.time([("scale_heads", "float32", 0, ["reference", "cpu", COMPILED])])
    assert set(timed["times"]) == {"reference", "cpu", COMPILED}
    assert all(0 < times["low"] <= times["step"] <= times["high"] for times in timed["times"].values())
