"""`actscale-fast doctor`: what was built, what runs here, and why the rest does not."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from faked_supervisor import Faked

import actscale_fast as af
from actscale_fast.cli import doctor, main
from actscale_fast.ops import backends, device_identity


def report(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON document, and what a person reads, on one line."""
    capsys.readouterr()
    assert main(["doctor", "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    return facts, " ".join(capsys.readouterr().out.split())


def test_it_says_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    facts, printed = report(capsys)
    assert set(facts) == {"installed", "compiled", "devices", "backends", "verdicts"}
    assert facts["installed"]["torch"] == torch.__version__
    assert facts["backends"]["chosen"] == backends.get_backend()
    for name, reason in facts["backends"]["unavailable"].items():
        assert (reason or "") == backends.unavailable(name)
        assert f"{name} {f'cannot run: {reason}' if reason else 'can run'}" in printed
    if not backends.unavailable("cpu"):
        assert facts["compiled"]["simd_level"] in facts["compiled"]["simd_levels"]
        assert facts["compiled"]["compiler"]
        assert bool(facts["compiled"]["cuda_archs"]) != bool(facts["compiled"]["cuda_reason"])
        assert facts["backends"]["used_for_float32"]["cpu"] == "cpu"


def fake_extension(**kernels: Any) -> types.SimpleNamespace:
    """An extension that was built without architecture 100; with kernels: with CUDA."""
    record = {"compiler": "g++ 12", "openmp": True, "nvcc": "/opt/nvcc", "no_cuda": "" if kernels else "no nvcc"}
    record["simd_levels"] = ("portable", "avx2", "avx512")
    record["dropped_levels"] = {"avx512_bf16": "g++: error: unrecognized command-line option '-mavx512bf16'"}
    record["dropped_archs"] = {"100": "nvcc fatal: Unsupported gpu architecture 'compute_100'"}
    names = types.SimpleNamespace(**kernels)
    return types.SimpleNamespace(
        __file__="/site/_C.so", build_record=lambda: record, levels=lambda: ["portable", "avx2"],
        levels_by_verdict=list, level=lambda: "avx2", **({"cuda": names} if kernels else {}),
    )  # fmt: skip


def test_an_architecture_that_was_left_out_and_a_gpu_without_code_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "Tesla T4 has compute capability 7.5, and the kernels need 8.0 or later"
    module = fake_extension(archs=lambda: [80, 90], toolkit=lambda: "12.4", unavailable_on=lambda index: reason)
    gpu = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40, total_memory=15 << 30)
    monkeypatch.setattr(doctor, "extension", lambda: module)
    monkeypatch.setattr(device_identity, "driver_version", lambda: "550.54.15")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(backends, "unavailable", lambda name: f"CUDA says: {reason}" if name == "cuda" else "")
    monkeypatch.setattr(backends, "resolve", lambda device, dtype: "reference")
    facts, printed = report(capsys)
    assert facts["compiled"]["cuda_archs"] == [80, 90]
    assert facts["compiled"]["cuda_dropped_archs"] == module.build_record()["dropped_archs"]
    assert facts["devices"]["gpus"][0]["cuda_reason"] == reason
    assert facts["backends"]["used_for_float32"] == {"cpu": "reference", "cuda:0": "reference"}
    for words in (
        "sm_80, sm_90, with PTX for later GPUs; CUDA 12.4 (/opt/nvcc)",
        "left out: sm_100 nvcc fatal: Unsupported gpu architecture 'compute_100'",
        "GPU 0 Tesla T4, capability 7.5, 40 multiprocessors, 15.0 GiB",
        f"CUDA kernels {reason}",
        f"cuda cannot run: CUDA says: {reason}",
        "NVIDIA driver 550.54.15",
        "SIMD levels portable, avx2 (in use), avx512 (not on this processor)",
        "left out: avx512_bf16 g++: error: unrecognized command-line option '-mavx512bf16'",
    ):
        assert words in printed, printed


def test_a_level_that_waits_for_a_verdict_is_said_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, level = fake_extension(), "avx512_bf16"
    record = module.build_record()
    record["simd_levels"], record["dropped_levels"] = ("portable", "avx2", level), {}
    module.levels, module.levels_by_verdict = lambda: ["portable", "avx2", level], lambda: [level]
    monkeypatch.setattr(doctor, "extension", lambda: module)
    facts, printed = report(capsys)
    assert facts["compiled"]["simd_by_verdict"] == [level]
    assert "avx2 (in use), avx512_bf16 (only where a verdict has found it faster)" in printed


def test_it_says_what_did_not_pass_verification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACTSCALE_VERDICTS", str(tmp_path))
    assert "cpu none yet; made by: actscale-fast verify --device cpu" in report(capsys)[1]
    af.verify_kernels("cpu", supervisor=Faked("cpu", failing={"scale_channels": "odd: off"}))
    facts, printed = report(capsys)
    backends.reconsider()
    assert facts["verdicts"]["cpu"]["choices"]
    if not backends.unavailable("cpu"):
        assert "cpu scale_channels float32 wrong: odd: off" in printed


def test_an_extension_without_cuda_kernels_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "extension", fake_extension)
    facts, printed = report(capsys)
    assert facts["compiled"]["cuda_reason"] == "no nvcc"
    assert "CUDA kernels none: no nvcc" in printed


def test_a_missing_extension_is_part_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "extension", lambda: None)
    monkeypatch.setattr(backends, "unavailable", lambda name: "the C++ extension was not built (no compiler)")
    facts, printed = report(capsys)
    assert facts["compiled"] == {"extension": None, "reason": "the C++ extension was not built (no compiler)"}
    assert "extension the C++ extension was not built (no compiler)" in printed
