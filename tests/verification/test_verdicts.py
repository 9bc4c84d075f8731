"""What a verification saves, when a verdict holds, and what `auto` makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faked_supervisor import Faked

import actscale_fast as af
from actscale_fast.ops import backends, device_identity, verdicts
from actscale_fast.verification import ensure

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ACTSCALE_VERDICTS", str(tmp_path / "verdicts"))
    monkeypatch.delenv("ACTSCALE_VERIFY", raising=False)
    monkeypatch.setattr(ensure, "_tried", set())
    backends.reconsider()
    with backends.use_backend("auto"):
        yield tmp_path / "verdicts"
    verdicts.distrusted.clear()
    backends.reconsider()


def chosen(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    return [backends.resolve(CPU, dtype, op, size) for size in range(3)]


def test_auto_uses_what_passed_and_plain_pytorch_for_what_did_not() -> None:
    found = af.verify_kernels("cpu", supervisor=Faked("cpu", failing={"scale_heads": "odd: result 1 is off by 0.1"}))
    assert chosen("scale_heads") == ["reference"] * 3
    assert chosen("intervention_loss") == ["cpu"] * 3
    assert not found.ok
    assert "cpu scale_heads float32: wrong (odd: result 1 is off by 0.1)" in found.failures
    assert "cpu scale_heads float32: wrong (odd: result 1 is off by 0.1)" in str(found)


def test_auto_uses_plain_pytorch_for_a_size_at_which_it_is_faster_beyond_the_spread() -> None:
    def times(op: str, size: int, name: str) -> tuple[float, float, float]:
        if name == "reference":
            return (5.0, 4.0, 6.0) if size == 0 else (9.0, 8.0, 10.0)  # medium: faster, but within the spread
        return (9.5, 8.5, 11.0)

    af.verify_kernels("cpu", supervisor=Faked("cpu", times=times))
    assert chosen("scale_heads") == ["reference", "cpu", "cpu"]


def test_a_kernel_whose_timing_died_is_not_chosen() -> None:
    class Untimed(Faked):
        def time(self, requests: Sequence[tuple[str, str, int, Sequence[str]]]) -> list[dict[str, Any]]:
            return [one for one in super().time(requests) if one["op"] != "scale_heads"]

    af.verify_kernels("cpu", supervisor=Untimed("cpu"))
    assert chosen("scale_heads") == ["reference"] * 3
    assert chosen("dynamic_scale") == ["cpu"] * 3


def test_a_verdict_is_read_by_the_next_process_and_holds_for_exactly_these_facts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = af.verify_kernels("cpu", supervisor=Faked("cpu", failing={"scale_heads": "off"}))
    assert verdicts.load(CPU) == json.loads(json.dumps(found.verdict))
    for change in ("kernels", "torch", "triton", "name", "instructions"):
        facts = device_identity.identity(CPU) | {change: "another"}
        with monkeypatch.context() as patched:
            patched.setattr(device_identity, "identity", lambda device, facts=facts: facts)
            assert verdicts.load(CPU) is None, change


def test_a_changed_kernel_source_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    source = tmp_path / "triton" / "scale_heads.py"
    source.write_text("BLOCK = 64\n")
    monkeypatch.setattr(device_identity, "_OPS", tmp_path)
    before = device_identity.kernels_digest.__wrapped__()
    source.write_text("BLOCK = 128\n")
    assert device_identity.kernels_digest.__wrapped__() != before


def test_a_damaged_verdict_counts_as_none_with_a_warning() -> None:
    found = af.verify_kernels("cpu", supervisor=Faked("cpu"))
    path = Path(found.path)
    path.write_text(path.read_text().replace('"reference"', '"refer3nce"').replace("wrong", "ok"))
    path.write_text(path.read_text()[:-30])
    backends.reconsider()
    with pytest.warns(RuntimeWarning, match=r"the verdict on kernels in .* cannot be used"):
        assert chosen("scale_heads") == ["cpu"] * 3


def test_a_shipped_verdict_serves_where_the_cache_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = af.verify_kernels("cpu", supervisor=Faked("cpu", failing={"scale_heads": "off"}))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    Path(found.path).rename(shipped / Path(found.path).name)
    monkeypatch.setattr(verdicts, "SHIPPED", shipped)
    backends.reconsider()
    assert chosen("scale_heads") == ["reference"] * 3


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("mps", ValueError, "device: got 'mps', expected 'cpu' or a CUDA device such as 'cuda:0'"),
        ("cuda:7", RuntimeError, "device: got 'cuda:7', but PyTorch finds no GPU here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, error: type[Exception], message: str) -> None:
    if torch.cuda.is_available() and device.startswith("cuda"):
        pytest.skip("there is a GPU here")
    with pytest.raises(error) as caught:
        af.verify_kernels(device)
    assert str(caught.value) == message


def _verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    verify = ensure.verify_locked

    def faked(device: torch.device, *options: Any) -> Any:
        made.append(str(device))
        return verify(device, True, None, Faked(str(device)))

    monkeypatch.setattr(ensure, "verify_locked", faked)
    return made


def test_long_work_on_a_cpu_verifies_once_if_asked_to_and_never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _verifications(monkeypatch)
    ensure.ensure_verified(CPU)
    assert made == []
    monkeypatch.setenv("ACTSCALE_VERIFY", "1")
    ensure.ensure_verified(CPU)
    ensure.ensure_verified(CPU)
    assert made == ["cpu"]


def test_long_work_on_a_gpu_verifies_by_itself_unless_forbidden_or_a_backend_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    monkeypatch.setattr(ensure, "_verify_once", lambda device, progress: made.append(str(device)))
    monkeypatch.setattr(ensure, "kernel_backends", lambda device: ["triton"])
    capturing: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    gpu = torch.device("cuda", 0)
    ensure.ensure_verified(gpu)
    assert made == ["cuda:0"]
    capturing.append(True)
    ensure.ensure_verified(gpu)
    capturing.clear()
    with monkeypatch.context() as patched:
        patched.setenv("ACTSCALE_VERIFY", "0")
        ensure.ensure_verified(gpu)
    with monkeypatch.context() as patched:
        patched.setenv("ACTSCALE_VERIFY", "ask")
        patched.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        ensure.ensure_verified(gpu)
    with backends.use_backend("reference"):
        ensure.ensure_verified(gpu)
    assert made == ["cuda:0"]


def test_a_verdict_that_lacks_kernels_is_completed_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _verifications(monkeypatch)
    monkeypatch.setenv("ACTSCALE_VERIFY", "1")
    af.verify_kernels("cpu", supervisor=Faked("cpu", untested=("scale_heads",)))
    assert chosen("scale_heads") == ["reference"] * 3
    ensure.ensure_verified(CPU)
    assert made == ["cpu"]
    assert chosen("scale_heads") == ["cpu"] * 3


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSCALE_VERIFY", "maybe")
    with pytest.raises(
        ValueError, match="environment variable ACTSCALE_VERIFY: got 'maybe', expected one of 0, 1, ask"
    ):
        ensure.ensure_verified(CPU)


def test_a_verification_that_cannot_be_made_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device, *options: Any) -> None:
        raise OSError("no room")

    monkeypatch.setenv("ACTSCALE_VERIFY", "1")
    monkeypatch.setattr(ensure, "verify_locked", failing)
    with pytest.warns(RuntimeWarning, match="the kernels on cpu could not be verified: no room"):
        ensure.ensure_verified(CPU)
