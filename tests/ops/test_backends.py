"""The choice of backend: by name, by environment variable, by `auto`; refused with a reason, never replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from op_cases import error_of

from actscale_fast import ops
from actscale_fast.ops import backends, verdicts


@pytest.fixture(autouse=True)
def _restored() -> object:
    before = backends.get_backend()
    backends.reconsider()
    yield
    backends._choice = before
    backends.reconsider()


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "ACTSCALE_BACKEND")}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )


def test_an_unknown_backend_name_is_refused_with_the_list_of_names() -> None:
    message = error_of(lambda: ops.set_backend("cpp"), ValueError)  # type: ignore[arg-type]
    assert message == "backend: got 'cpp', expected one of auto, cpu, triton, cuda, reference; did you mean 'cpu'?"


def test_a_backend_that_cannot_run_is_refused_with_the_reason_and_the_choice_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = backends.get_backend()
    monkeypatch.setattr(backends, "unavailable", lambda name: "the C++ extension was not built (no compiler)")
    message = error_of(lambda: ops.set_backend("cpu"), RuntimeError)
    assert message == "backend 'cpu' cannot run here: the C++ extension was not built (no compiler)"
    assert backends.get_backend() == before


@pytest.mark.parametrize(
    ("built", "cuda_version", "gpu", "driver", "reason"),
    [
        (False, "13.0", True, "", "the extension was built without CUDA kernels: no nvcc was found"),
        (True, None, False, "", "this build of PyTorch has no CUDA"),
        (True, "13.0", False, "", "no GPU was found"),
        (True, "13.0", True, "driver too old", "CUDA says: driver too old"),
        (True, "13.0", True, "", ""),
    ],
)
def test_the_cuda_backend_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, built: bool, cuda_version: str | None, gpu: bool, driver: str, reason: str
) -> None:
    extension = types.ModuleType("actscale_fast.ops._C")
    extension.build_record = lambda: {"no_cuda": "" if built else "no nvcc was found"}
    if built:
        extension.cuda = types.SimpleNamespace(unavailable=lambda: driver)
    monkeypatch.setitem(sys.modules, "actscale_fast.ops._C", extension)
    monkeypatch.setattr(backends, "has_extension", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    said = backends.unavailable.__wrapped__("cuda")
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


def test_use_backend_restores_the_choice_even_after_an_error() -> None:
    before = backends.get_backend()
    seen = []

    def interrupted() -> None:
        with ops.use_backend("reference"):
            seen.append(ops.get_backend())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert seen == ["reference"]
    assert ops.get_backend() == before


def test_auto_takes_the_kernels_for_narrow_types_and_plain_pytorch_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.set_backend("auto")
    monkeypatch.setattr(backends, "has_extension", lambda: True)
    cpu = torch.device("cpu")
    assert [backends.resolve(cpu, d) for d in (torch.float32, torch.bfloat16, torch.float16)] == ["cpu"] * 3
    assert backends.resolve(cpu, torch.float64) == "reference"
    monkeypatch.setattr(backends, "has_extension", lambda: False)
    backends.reconsider()
    assert backends.resolve(cpu, torch.float32) == "reference"


def test_auto_on_a_gpu_takes_what_passed_there_and_plain_pytorch_without_a_verdict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ops.set_backend("auto")
    device = torch.device("cuda", 0)
    table = {("scale_heads", torch.float32): verdicts.Choice(("reference", "triton", "cuda"), ("cuda", "triton"))}
    monkeypatch.setattr(backends, "unavailable_on", lambda name, device_type, index: "")
    monkeypatch.setattr(backends, "unavailable", lambda name: "")
    monkeypatch.setattr(verdicts, "choices", CachedChoices(table))
    assert [backends.resolve(device, torch.float32, "scale_heads", size) for size in range(3)] == [
        "reference", "triton", "cuda",
    ]  # fmt: skip
    assert backends.resolve(device, torch.bfloat16, "scale_heads") == "reference"
    monkeypatch.setattr(verdicts, "choices", CachedChoices(None))
    backends.reconsider()
    backends._say_unverified.cache_clear()
    with caplog.at_level("INFO", logger="actscale_fast"):
        assert [backends.resolve(device, torch.float32, op) for op in verdicts.OPS] == ["reference"] * len(verdicts.OPS)
    assert [record.getMessage().endswith("actscale-fast verify --device cuda:0") for record in caplog.records] == [True]


class CachedChoices:
    """In the place of `verdicts.choices`: one table for every device."""

    def __init__(self, table: verdicts.Choices | None) -> None:
        self.table = table

    def __call__(self, device_type: str, index: int | None) -> verdicts.Choices | None:
        return self.table

    def cache_clear(self) -> None:
        pass


def test_a_named_backend_refuses_tensors_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_choice", "cpu")
    message = error_of(lambda: backends.resolve(torch.device("cpu"), torch.float64), RuntimeError)
    assert message == "backend 'cpu' takes float32, bfloat16 and float16, got torch.float64; use 'reference'"
    message = error_of(lambda: backends.resolve(torch.device("cuda", 0), torch.float32), RuntimeError)
    assert message == "backend 'cpu' takes cpu tensors, got one on cuda:0"
    monkeypatch.setattr(backends, "_choice", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = error_of(lambda: backends.resolve(torch.device("cpu"), torch.float32), RuntimeError)
    assert message == "backend 'triton' takes cuda or xpu tensors, got one on cpu"


def test_an_invalid_environment_variable_stops_the_import_with_its_name() -> None:
    result = in_a_new_process("import actscale_fast.ops", ACTSCALE_BACKEND="fast")
    assert result.returncode != 0
    assert "ValueError: environment variable ACTSCALE_BACKEND: backend: got 'fast', expected one of" in result.stderr


def test_the_environment_variable_chooses_the_backend_and_one_that_cannot_run_is_refused() -> None:
    code = "from actscale_fast import ops; print(ops.get_backend())"
    assert in_a_new_process(code, ACTSCALE_BACKEND="reference").stdout.strip() == "reference"
    result = in_a_new_process(code, ACTSCALE_BACKEND="cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0
    assert "RuntimeError: environment variable ACTSCALE_BACKEND: backend 'cuda' cannot run here: " in result.stderr


def test_a_missing_extension_is_said_once_and_plainly_and_results_still_come() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'actscale_fast.ops._C' else find(name, *rest)\n"
        "import torch; from actscale_fast import ops\n"
        "x = torch.ones(1, 1, 1, 1); a = torch.ones(1, 1, 1)\n"
        "print(float(ops.scale_heads(x, a)), float(ops.scale_heads(x, a)))"
    )
    result = in_a_new_process(code)
    assert result.stdout.strip() == "2.0 2.0", result.stderr
    assert result.stderr.count("RuntimeWarning: actscale_fast runs without its C++ extension") == 1


def test_importing_the_package_needs_neither_a_compiled_extension_nor_triton_nor_transformers() -> None:
    heavy = "('triton', 'transformers', 'matplotlib', 'actscale_fast.ops._C')"
    code = f"import sys, actscale_fast; print([name for name in {heavy} if name in sys.modules])"
    result = in_a_new_process(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
