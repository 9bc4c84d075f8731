"""A level of the C++ kernels that needs a verdict: tested, timed beside that in use, used where it is faster."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from faked_supervisor import Faked

import actscale_fast as af
from actscale_fast.ops import backends, device_identity
from actscale_fast.verification import speed
from actscale_fast.verification.supervisor import Outcome
from actscale_fast.verification.worker import Job

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACTSCALE_VERDICTS", str(tmp_path / "verdicts"))
    backends.reconsider()
    with backends.use_backend("auto"):
        yield
    backends.reconsider()


LEVEL = "avx512_bf16"


class Processor:
    """The extension on a processor that has the level, and which kernel a call of `linear_softmax` took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, level: str = LEVEL) -> None:
        self.taken: list[str] = []
        extension = importlib.import_module("actscale_fast.ops._C")
        module = importlib.import_module("actscale_fast.ops.cpu.linear_softmax")
        monkeypatch.setattr(extension, "levels_by_verdict", lambda: [level])
        monkeypatch.setattr(module, "LEVELS_BY_VERDICT", (level,))
        monkeypatch.delenv("ACTSCALE_CPU_LEVEL", raising=False)
        usual = extension.linear_softmax
        for name in ("linear_softmax", "linear_softmax_by_verdict"):
            monkeypatch.setattr(extension, name, lambda name=name, **given: (self.taken.append(name), usual(**given)))

    def of_a_call(self, dtype: torch.dtype = torch.bfloat16) -> str:
        rows = torch.ones(2, 8, dtype=dtype)
        backend = importlib.import_module("actscale_fast.ops.cpu")
        backend.linear_softmax(rows, rows, None, None, None, False, 1.0, 1 << 20)
        return self.taken[-1]


class AtLevels(Faked):
    """Times of the level relative to those of the level in use, by size; and the jobs at each level."""

    factors = (0.5, 0.5, 0.5)
    wrong_at_level = False
    at: ClassVar[list[tuple[str | None, Job]]] = []

    def verify(self, jobs: Sequence[Job]) -> list[Outcome]:
        level = self.environment.get("ACTSCALE_CPU_LEVEL")
        self.at.extend((level, job) for job in jobs)
        if self.wrong_at_level and level == LEVEL:
            return [Outcome(job, "wrong", "odd: off") for job in jobs]
        return super().verify(jobs)

    def time(self, requests: Sequence[tuple[str, str, int, Sequence[str]]]) -> list[dict[str, Any]]:
        made = super().time(requests)
        for one in made:
            for name in ("cpu avx512_bf16", "cpu avx512_amx"):
                if name in one["times"]:
                    times = {key: value * self.factors[one["size"]] for key, value in one["times"]["cpu"].items()}
                    one["times"][name] = times
        return made


def test_a_level_that_needs_a_verdict_is_used_where_it_passed_and_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(monkeypatch)
    assert processor.of_a_call() == "linear_softmax"  # no verdict
    AtLevels.at.clear()
    found = af.verify_kernels("cpu", supervisor=AtLevels("cpu"))
    assert processor.of_a_call() == "linear_softmax_by_verdict"
    assert processor.of_a_call(torch.float32) == "linear_softmax"
    assert [job for level, job in AtLevels.at if level == LEVEL] == [Job("cpu", "linear_softmax", "bfloat16")]
    assert None not in {level for level, _ in AtLevels.at}  # an earlier verdict must not choose what is tested
    assert found.verdict["choices"]["linear_softmax"]["bfloat16"]["level"] == LEVEL
    assert f"cpu {LEVEL}" in str(found)
    monkeypatch.setenv("ACTSCALE_CPU_LEVEL", str(device_identity.cpu_level()))
    assert processor.of_a_call() == "linear_softmax"


def test_a_level_for_every_dtype_is_tested_and_used_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(monkeypatch, "avx512_amx")
    AtLevels.at.clear()
    af.verify_kernels("cpu", supervisor=AtLevels("cpu"))
    jobs = [job for level, job in AtLevels.at if level == "avx512_amx"]
    assert jobs == [Job("cpu", "linear_softmax", dtype) for dtype in ("float32", "bfloat16", "float16")]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert processor.of_a_call(dtype) == "linear_softmax_by_verdict"


@pytest.mark.parametrize("factors", [(0.5, 0.5, 0.95), (1.5, 0.5, 0.5), (2.0, 2.0, 2.0)])
def test_a_level_that_is_not_faster_beyond_the_spread_or_slower_at_a_size_is_not_used(
    factors: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor(monkeypatch)
    monkeypatch.setattr(AtLevels, "factors", factors)
    found = af.verify_kernels("cpu", supervisor=AtLevels("cpu"))
    assert "level" not in found.verdict["choices"]["linear_softmax"]["bfloat16"]
    assert found.ok
    assert processor.of_a_call() == "linear_softmax"


def test_a_level_that_is_wrong_is_not_used_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(monkeypatch)
    monkeypatch.setattr(AtLevels, "wrong_at_level", True)
    found = af.verify_kernels("cpu", supervisor=AtLevels("cpu"))
    assert found.failures == [f"cpu {LEVEL} linear_softmax bfloat16: wrong (odd: off)"]
    assert not any(f"cpu {LEVEL}" in one["times"] for one in found.verdict["times"])
    assert backends.resolve(CPU, torch.bfloat16, "linear_softmax") == "cpu"
    assert processor.of_a_call() == "linear_softmax"


def test_levels_are_timed_in_turns_and_the_level_in_use_is_the_same_afterwards() -> None:
    extension = importlib.import_module("actscale_fast.ops._C")
    before = extension.level()
    times = speed.microseconds("scale_heads", torch.float32, 0, ["reference", "cpu", "cpu portable"], CPU, quick=True)
    assert set(times) == {"reference", "cpu", "cpu portable"}
    assert extension.level() == before
