"""Every CUDA kernel compiles for sm_80, sm_90 and sm_100 without a spill and within its registers; no GPU is needed."""

from __future__ import annotations

import re

import pytest
from cubins import Usage, compiled

ARCHITECTURES = (80, 90, 100)
TYPES = ("float32", "bf16", "half16")
#: Kernel -> (registers a thread at most: 65536 over the threads that its launch constants want on a multiprocessor at
#: once, the types it is compiled for).
KERNELS = {
    "intervention_loss_kernel": (65536 // (2 * 256), TYPES),
    "intervention_loss_scale_kernel": (65536 // (4 * 256), TYPES),
    "scale_heads_kernel": (65536 // (4 * 256), TYPES),
    "scale_heads_backward_kernel": (65536 // (2 * 256), TYPES),
    "dynamic_scale_kernel": (65536 // (4 * 256), TYPES),
    "dynamic_scale_backward_kernel": (65536 // (3 * 256), TYPES),
    "scale_channels_kernel": (65536 // (4 * 256), TYPES),
    "scale_channels_backward_kernel": (65536 // (2 * 256), TYPES),
    "sum_groups_kernel": (65536 // (2 * 512), ("",)),
    "proximal_adam_kernel": (65536 // 512, ("",)),
    "count_step_kernel": (65536 // 32, ("",)),
}

pytestmark = pytest.mark.slow


def by_type(usages: dict[str, Usage]) -> dict[tuple[str, str], Usage]:
    """By (kernel, type); of a kernel's variants the most of each."""
    found: dict[tuple[str, str], Usage] = {}
    for mangled, usage in usages.items():
        name = next(name for name in KERNELS if f"{len(name)}{name}" in mangled)
        kind = next((kind for kind in TYPES if mangled.partition(name)[2].startswith(f"INS0_{len(kind)}{kind}E")), "")
        found[name, kind] = Usage(*map(max, usage, found.get((name, kind), usage)))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_without_a_spill_and_within_its_registers(arch: int) -> None:
    found = by_type(compiled(arch).usage)
    assert set(found) == {(name, kind) for name, (_, kinds) in KERNELS.items() for kind in kinds}
    for (name, kind), usage in found.items():
        print(f"sm_{arch} {name} {kind}: {usage.registers} registers")
        assert (usage.stack, usage.local) == (0, 0), (name, kind)  # a spilled register would lie there
        assert usage.registers <= KERNELS[name][0], (name, kind, usage)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_are_copied_read_and_written_16_bytes_at_a_time(arch: int) -> None:
    ptx = compiled(arch).ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 16;", ptx["intervention_loss"])
    for file in ("intervention_loss", "intervention_loss_scale", "scale_heads", "scale_channels", "dynamic_scale"):
        assert "ld.global.v4" in ptx[file], file
        assert "st.global.v4" in ptx[file], file


def test_clusters_are_used_from_sm_90_on() -> None:
    used = {arch: "barrier.cluster" in compiled(arch).ptx["intervention_loss"] for arch in ARCHITECTURES}
    assert used == {80: False, 90: True, 100: True}
