"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100 without a spill; no GPU is needed.

The launches are recorded, not written down again: the adaptors run on meta tensors of real sizes with `JITFunction.run`
replaced, so signatures, constants and warps are those of the real launches, and reading a value would raise. That needs
the interpreter off, so this file runs itself in a process of its own per architecture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

Reports = dict[int, list[dict[str, Any]]]  # by architecture: one entry a compiled kernel
PROCESSORS = {80: 108, 90: 132, 100: 148}
#: The launch constants count on four blocks of 128 threads a multiprocessor: 65536 registers over 512 threads.
MOST_REGISTERS = 128
KERNELS = {
    "scale_heads_fwd_kernel",
    "scale_heads_bwd_kernel",
    "dynamic_scale_fwd_kernel",
    "dynamic_scale_bwd_kernel",
    "scale_channels_fwd_kernel",
    "scale_channels_bwd_kernel",
    "sum_groups_kernel",
    "intervention_loss_scan_kernel",
    "intervention_loss_finish_kernel",
    "intervention_loss_scale_kernel",
    "softmax_rows_scan_kernel",
    "softmax_rows_finish_kernel",
    "proximal_adam_kernel",
}


@pytest.fixture(scope="module")
def compiled() -> Reports:
    """What each architecture's process reports; they run beside one another."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton is not installed, or not for NVIDIA GPUs")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "ACTSCALE_BACKEND": "auto"}
    found_in = [str(root), str(root / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(found_in)
    processes = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in PROCESSORS
    }
    reports = {}
    for arch, process in processes.items():
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0, f"sm_{arch}: {errors}"
        reports[arch] = json.loads(out.splitlines()[-1])
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("arch", PROCESSORS)
def test_every_kernel_compiles_to_a_cubin_without_spills(compiled: Reports, arch: int) -> None:
    assert {report["kernel"] for report in compiled[arch]} == KERNELS
    for report in compiled[arch]:
        assert report["cubin"], report
        assert report["stack"] == report["local"] == 0, f"spills: {report}"
        assert report["registers"] <= MOST_REGISTERS, report


@pytest.mark.slow
def test_rows_of_any_width_are_read_16_bytes_at_a_time(compiled: Reports) -> None:
    for report in compiled[90]:
        only_combines = "p_grad" in report["absent"] and "p_partials" not in report["absent"]
        if report["kernel"].startswith("intervention_loss") and not only_combines:
            assert report["vector_loads"] > 0, report
            assert report["vector_stores"] > 0 or report["kernel"] == "intervention_loss_scan_kernel", report
        if report["kernel"].startswith("softmax_rows"):
            assert report["vector_loads"] > 0, report


@pytest.mark.slow
def test_the_scan_reduces_in_registers_and_takes_two_exponentials_a_pair(compiled: Reports) -> None:
    for report in compiled[90]:
        if report["kernel"] == "intervention_loss_scan_kernel":
            # 16 pairs a thread and tile, one rescaling of both sums a tile, one in the merge behind the loop
            assert report["exponentials"] <= 2 * 16 + 4, report
            assert report["shuffles"] <= 7 * 5, report  # seven reductions over a warp in that merge


def launches(multiprocessors: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, keyword arguments) of the launches that real sizes make."""
    import torch
    from triton.runtime.jit import JITFunction

    from actscale_fast.ops import triton as kernels
    from actscale_fast.ops.triton import device
    from actscale_fast.ops.triton.linear_softmax import _softmax_rows

    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.run = lambda self, *arguments, grid, warmup, **rest: recorded.append((self, arguments, rest))  # type: ignore
    device.NO_GPU_PROCESSORS = multiprocessors

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.float32, torch.bfloat16):
        for B, T, H, D in ((32, 512, 32, 128), (4, 24, 12, 64), (2, 32, 1, 4096)):
            x, group = meta(B, T, H, D, dtype=dtype), meta(B, dtype=torch.int64)
            alpha = meta(1, 1, H)
            kernels.scale_heads(x, alpha, None, 1.0, None, None)
            kernels.scale_heads_backward(x, x, alpha, None, 1.0, None, None, True, True, False)
            kernels.scale_heads_backward(x, x, alpha, None, 1.0, meta(B), None, False, True, False)
        for B, T, H, D in ((32, 512, 32, 128), (4, 24, 12, 64), (2, 32, 1, 4096), (2, 32, 1, 16384)):
            x, weight, alpha = meta(B, T, H, D, dtype=dtype), meta(1, H, D), meta(B, T, H)
            kernels.dynamic_scale(x, weight, None, 1.0, None, None)
            kernels.dynamic_scale_backward(x, None, x, weight, alpha, 1.0, None, None, True, True, False)
            weight, bias, group = meta(3, H, D), meta(3, H), meta(B, dtype=torch.int64)
            kernels.dynamic_scale(x, weight, bias, 1.0, meta(B), group)
            kernels.dynamic_scale_backward(x, alpha, x, weight, alpha, 1.0, meta(B), group, True, True, True)
            kernels.dynamic_scale_backward(x, alpha, x, weight, alpha, 1.0, meta(B), group, False, True, True)
        for N, d in ((16384, 4096), (96, 768), (8192, 14336)):
            x, weight = meta(N, d, dtype=dtype), meta(d)
            kernels.scale_channels(x, weight)
            kernels.scale_channels_backward(x, x, weight, True, True)
            kernels.scale_channels_backward(x, x, weight, False, True)
            kernels.scale_channels_backward(x, x, weight, True, False)
        B, T, H, D = 2, 32, 1, 4096
        x, group = meta(B, T, H, D, dtype=dtype), meta(B, dtype=torch.int64)
        alpha, shift = meta(3, T, H), meta(3, T, H, D)
        kernels.scale_heads(x, alpha, shift, 1.0, meta(B), group)
        kernels.scale_heads_backward(x, x, alpha, shift, 1.0, meta(B), group, True, True, True)
        kernels.scale_heads_backward(x, x, None, meta(3, 1, H, D), 1.0, meta(B), group, True, False, True)
        for N, V in ((64, 128256), (64, 50257), (8192, 128256)):
            z, ids = meta(N, V, dtype=dtype), meta(N, dtype=torch.int64)
            for exclude, reverse in ((True, False), (False, True)):
                *_, answer_grad, _, _ = kernels.intervention_loss(
                    z, z, ids, ids, meta(N), meta(24, 1, 32), 1.0, 1.0, exclude, reverse, True
                )
            kernels.intervention_loss_scale_(z, meta(N), meta(N), ids, ids, answer_grad)
            for reverse, softcap in ((False, 30.0), (True, 30.0), (False, None)):
                kernels.intervention_loss(
                    z, z, None, None, None, None, 0.0, 0.5, False, reverse, True, meta(N), softcap
                )
        kernels.intervention_loss(z[:64], z[:64], None, None, None, None, 1.0, 1.0, True, False, False)
    for R, V in ((64, 128256), (128, 50257), (3, 50257), (1040, 128256)):
        products, ids, bias = meta(R, V), meta(R, dtype=torch.int64), meta(V)
        for dtype in (torch.float32, torch.bfloat16):
            _softmax_rows(products, bias, ids, ids, True, 1.0, dtype)
            _softmax_rows(products, None, ids, ids, True, 0.0625, dtype)
        _softmax_rows(products, None, ids, ids, False, 1.0, torch.bfloat16)
        _softmax_rows(products, bias, None, None, False, 1.0, torch.float16)
    for n in (768, 1 << 20):
        p = meta(n)
        kernels.proximal_adam_(p, p, p, p, meta(1)[0], 0.03, 0.9, 0.999, 1e-8, 0.1)
    return recorded


def report_of(kernel: Any, cubin: bytes, ptx: str) -> dict[str, Any]:
    """Registers and stack of a cubin, as the cuobjdump that comes with Triton tells them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {
        "kernel": kernel.__name__,
        "cubin": len(cubin),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "exponentials": ptx.count("ex2.approx"),
        "shuffles": ptx.count("shfl.sync"),
        "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    }


def main(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton_sources import source_of

    reports = {}
    for kernel, arguments, rest in launches(PROCESSORS[arch]):
        source, options, _ = source_of(kernel, arguments, rest)
        key = (source.hash(), str(options))
        if key not in reports:
            result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            report = report_of(kernel, result.asm["cubin"], result.asm["ptx"])
            absent = [kernel.arg_names[index] for (index,), value in source.constants.items() if value is None]
            reports[key] = {**report, "absent": absent, "signature": list(source.signature.values())}
    print(json.dumps(list(reports.values())))


if __name__ == "__main__":
    main(int(sys.argv[1]))
