"""The machine code of the CUDA kernels for sm_90: instructions per pair of logits, wide accesses, no local memory.

No GPU runs here. On one, the losses' kernel in 16 bits is bound by instructions about as much as by memory, so what
a change adds to its loops shows here already. docs/kernels.md has the figures.
"""

from __future__ import annotations

import re

import pytest
import sass
from cubins import compiled

pytestmark = pytest.mark.slow

#: Columns of a thread's step, and its 16-byte vectors of each side by type: csrc/cuda/loss_share.h.
PER_THREAD, VECTORS = 16, {"float32": 4, "bf16": 2, "half16": 2}
#: Instructions per pair of logits, at most: (first pass, forward KL's gradient, reverse KL's, the two where the rows
#: are read again).
BUDGETS = {
    "float32": (21.0, 12.0, 15.5, 15.0, 18.5),
    "bf16": (20.5, 13.5, 17.0, 15.5, 19.0),
    "half16": (20.5, 13.5, 17.0, 15.5, 19.0),
}

Body = list[sass.Instruction | str]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Body]:
    """The instructions of each kernel, by its mangled name without the file's part."""
    if not sass.nvdisasm():
        pytest.skip("nvdisasm is neither on PATH nor installed with Triton")
    found: dict[str, Body] = {}
    for cubin in compiled(90).cubins:
        for name, body in sass.functions(sass.disassembled(cubin)).items():
            found[re.sub(r"^.*_cu_[0-9a-f]{8}\d+", "", name)] = body
    return found


def loss(kernels: dict[str, Body], kind: str) -> Body:
    """The losses' kernel without a soft-cap."""
    (name,) = (n for n in kernels if n.startswith(f"intervention_loss_kernelINS0_{len(kind)}{kind}ELb0E"))
    return kernels[name]


def per_pair(body: Body, **least: int) -> list[float]:
    starts = {"exponentials": "MUFU.EX2", "copies": "LDGSTS", "loads": "LDS.128", "stores": "STG.E.128"}
    found = sass.loops(body, {starts[name]: count for name, count in least.items()})
    assert not any(loop.count(opcode) for loop in found for opcode in ("MUFU.RCP", "I2F", "LDL", "STL"))
    return [loop.length / PER_THREAD for loop in found]


@pytest.mark.parametrize("kind", BUDGETS)
def test_the_losses_spend_few_instructions_on_a_pair_of_logits(kernels: dict[str, Body], kind: str) -> None:
    body, vectors = loss(kernels, kind), VECTORS[kind]
    both = 2 * vectors
    (scan,) = per_pair(body, exponentials=2 * PER_THREAD + 2, copies=both, loads=both)
    reverse, forward = per_pair(body, exponentials=PER_THREAD, loads=both, stores=vectors)
    again = per_pair(body, exponentials=PER_THREAD, loads=both, stores=vectors, copies=both)
    print(f"{kind}: first pass {scan:.1f}, gradient {forward:.1f} (reverse {reverse:.1f}), read again {again}")
    found = (scan, forward, reverse, again[1], again[0])
    assert all(a <= b for a, b in zip(found, BUDGETS[kind], strict=True)), found


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize(
    "name", ["scale_heads_kernel", "scale_heads_backward_kernel", "scale_channels_kernel", "dynamic_scale_kernel",
             "scale_channels_backward_kernel", "dynamic_scale_backward_kernel", "intervention_loss_scale_kernel"],
)  # fmt: skip
def test_activations_are_read_and_written_16_bytes_at_a_time(kernels: dict[str, Body], name: str, kind: str) -> None:
    variants = [b for n, b in kernels.items() if n.startswith(f"{name}INS0_{len(kind)}{kind}E")]
    assert variants
    for body in variants:
        opcodes = [item.opcode for item in body if not isinstance(item, str)]
        assert any(opcode.startswith("LDG.E.128") for opcode in opcodes)
        assert any(opcode.startswith("STG.E.128") for opcode in opcodes)


def test_no_kernel_uses_local_memory(kernels: dict[str, Body]) -> None:
    assert len(kernels) >= 30
    for name, body in kernels.items():
        used = {item.opcode for item in body if not isinstance(item, str) and item.opcode.startswith(("LDL", "STL"))}
        assert not used, (name, used)
