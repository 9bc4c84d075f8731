"""What the CUDA backend asks of its device: code for its capability, room for a cluster, a stream; and not Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_emulation.emulation import H100, emulated_backend
from op_cases import Inputs, textbook_losses

from actscale_fast.ops import cuda
from actscale_fast.ops.cuda import launch

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture
def device() -> Iterator[ModuleType]:
    with emulated_backend() as kernels:
        yield kernels
        kernels.set_model(1, 90, 13000)


@pytest.mark.parametrize(
    ("archs", "toolkit", "capability", "driver", "reason"),
    [
        ([800, 900, 1000], 13000, 90, 13000, ""),
        ([800], 13000, 89, 13000, ""),  # binaries of 8.0 run on every later 8.x
        ([800, 900], 13000, 120, 13010, ""),  # by PTX
        ([], 0, 90, 0, ""),  # not known what it was built for: the launch itself says
        ([800, 900, 1000], 13000, 75, 13000, "this GPU has compute capability 7.5, and the kernels need 8.0 or later"),
        ([800, 900, 1000], 13000, 70, 13000, "this GPU has compute capability 7.0, and the kernels need 8.0 or later"),
        (
            [900, 1000], 13000, 80, 13000,
            "this GPU has compute capability 8.0, and this build has code for 9.0, 10.0 only: install again with "
            "ACTSCALE_CUDA_ARCHS=80",
        ),
        (
            [890], 12080, 86, 12080,
            "this GPU has compute capability 8.6, and this build has code for 8.9 only: install again with "
            "ACTSCALE_CUDA_ARCHS=86",
        ),
        (
            [800, 900], 12080, 100, 12040,
            "this GPU has compute capability 10.0, and this build has code for 8.0, 9.0: a driver for CUDA 12.4 cannot "
            "compile the PTX of CUDA 12.8, so update the driver or install again with ACTSCALE_CUDA_ARCHS=100",
        ),
    ],
)  # fmt: skip
def test_a_device_that_this_build_has_no_code_for_is_named_with_what_to_do(
    device: ModuleType, archs: list[int], toolkit: int, capability: int, driver: int, reason: str
) -> None:
    assert device.cuda.missing_code(archs, toolkit, capability, driver) == reason


def test_the_backend_is_unavailable_where_no_device_can_run_it(device: ModuleType) -> None:
    assert device.cuda.unavailable() == device.cuda.unavailable_on(0) == ""
    device.set_model(2, 75, 13000)
    said = "has compute capability 7.5, and the kernels need 8.0 or later"
    assert device.cuda.unavailable() == f"emulated device 0 {said}"
    assert device.cuda.unavailable_on(1) == f"emulated device 1 {said}"
    device.set_model(0, 90, 13000)
    assert device.cuda.unavailable() == "no CUDA device was found"
    assert device.cuda.archs() == [80, 90, 100]
    assert device.cuda.toolkit() == "13.0"


@pytest.mark.parametrize("room", [1, 2, 3, 4, 7, 8])
def test_a_part_of_a_gpu_that_has_no_room_for_a_cluster_gets_a_smaller_one(
    inputs: Inputs, device: ModuleType, room: int
) -> None:
    """The device says that it supports clusters of 16, as a MIG slice does; without the limit the launch would fail."""
    rows = inputs.rows(2, 20011, torch.bfloat16)
    arguments = (*rows, None, 1.0, 1.0, True, False, True)
    block = 512 + 3 * 512 * 32  # a block has room for the ring, and not for a row
    device.set_limits(32, block, 2 * (block + 1024), 1024, 16)
    assert device.cuda.loss_plan(2, 20011, 2, (32, block, 2 * (block + 1024), 1024, 16))[0] == 8
    device.set_cluster_room(room)
    results = cuda.intervention_loss(*arguments)
    exact = textbook_losses(rows, (torch.ones(2), torch.ones(2)), torch.float64)
    torch.testing.assert_close(results[1].double(), exact.faithfulness, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2].double(), exact.gradient, rtol=2**-7, atol=1e-6)
    device.set_cluster_room(16)
    device.set_limits(*H100)
    torch.testing.assert_close(cuda.intervention_loss(*arguments)[2], results[2], rtol=2**-7, atol=1e-6)


def run_all(inputs: Inputs) -> None:
    """Every launcher of the backend once."""
    x, alpha, shift = inputs.normal(2, 3, 4, 8), inputs.normal(1, 1, 4), inputs.normal(1, 1, 4, 8)
    probe, scalars, rows = inputs.normal(1, 4, 8), inputs.normal(2, 3, 4), inputs.rows(3, 131)
    heads = (alpha, shift, 1.0, None, None)
    cuda.scale_heads(x, *heads)
    cuda.scale_heads_backward(x, x, *heads, True, True, True)
    cuda.dynamic_scale(x, probe, None, 1.0, None, None)
    cuda.dynamic_scale_backward(x, None, x, probe, scalars, 1.0, None, None, True, True, True)
    cuda.scale_channels(x, inputs.normal(8))
    cuda.scale_channels_backward(x, x, inputs.normal(8), True, True)
    losses = cuda.intervention_loss(*rows, alpha, 1.0, 1.0, True, False, True)
    cuda.intervention_loss_scale_(losses[2], rows.direction, rows.direction, rows.correct, rows.wrong, losses[3])
    for size in (30, 20000):
        state = [inputs.normal(size) for _ in range(2)] + [torch.zeros(size), torch.zeros(size)]
        cuda.proximal_adam_(*state, torch.zeros(()), 0.1, 0.9, 0.999, 1e-8, 0.0)


def test_every_launch_is_on_the_stream_it_was_given_and_without_pythons_lock(
    inputs: Inputs, device: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "stream_of", lambda x: 0x7F00)
    device.watch_launches()
    run_all(inputs)
    seen = device.launches_seen()
    assert len(seen) == 14
    assert set(seen) == {(0x7F00, False)}


def test_launchers_neither_wait_nor_allocate_so_that_graphs_capture_them() -> None:
    """All that they call of the runtime; each of these is allowed while a stream is captured."""
    if not CSRC.is_dir():
        pytest.skip("needs the source tree")
    allowed = {
        "cudaDeviceGetAttribute", "cudaDriverGetVersion", "cudaFuncSetAttribute", "cudaGetDevice", "cudaGetDeviceCount",
        "cudaGetDeviceProperties", "cudaGetErrorString", "cudaGetLastError", "cudaLaunchKernelEx",
        "cudaOccupancyMaxActiveClusters",
    }  # fmt: skip
    text = "\n".join(path.read_text() for path in sorted((CSRC / "cuda").glob("*")))
    assert set(re.findall(r"\bcuda[A-Z]\w*(?=\()", text)) == allowed
    assert "<<<" not in text


def test_the_backend_does_not_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from actscale_fast.ops import cuda, interface\n"
        "names = [n for n in vars(interface.BackendModule) if not n.startswith('_')]\n"
        "print(all(callable(getattr(cuda, n)) for n in names), len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True 10\n", done.stderr
