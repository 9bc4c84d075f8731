"""Faults in the kernels' PTX are caught: by the interpreter, or because the results are not those of the formulas.

Needs the launches of real PTX: pytest -p ptx.plugin (make test-ptx).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from op_cases import Backend, Inputs
from torch import Tensor

pytest.importorskip("triton.backends.nvidia", reason="Triton is not installed, or not for NVIDIA GPUs")

import dynamic_cases
import linear_cases
import loss_cases
from cuda_emulation.emulation import SMALL, Limits, emulated_backend
from ptx import cuda_hook
from ptx.execute import PtxError
from ptx.faults import (
    access,
    always,
    edit,
    guarded,
    increased,
    left_out,
    moved,
    opcode,
    otherwise,
    renamed,
    with_operand,
)
from ptx.parse import Instruction
from ptx.programs import Edit, edited

from actscale_fast import ops
from actscale_fast.ops import backends, reference

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif("ptx.plugin" not in sys.modules, reason="runs in `make test-ptx`: pytest -p ptx.plugin"),
]

Claim = Callable[[Inputs, torch.dtype], None]


def limits_of(cluster: int, vocab: int, size: int) -> Limits:
    """A device on which rows of such elements need a cluster of that size; 0: none holds them, they are read twice."""
    vectors = -(-(vocab + 16 // size - 1) // (16 // size))
    block = 512 + 32 * -(-vectors // cluster) if cluster else 512 + 2 * 16 * 3 * 1024
    return (1, block, 2 * (block + 1024), 1024, max(cluster, 1))


def cuda_loss(cluster: int) -> Claim:
    def check(inputs: Inputs, dtype: torch.dtype) -> None:
        vocab = (1531 if cluster else 12501) * (4 // dtype.itemsize) | 1
        limits = limits_of(cluster, vocab, dtype.itemsize)
        with emulated_backend(limits) as kernels:
            plan = kernels.cuda.loss_plan(2, vocab, dtype.itemsize, limits)
            assert (plan[0], plan[2]) == (max(cluster, 1), cluster > 0)
            check_loss("cuda", inputs, vocab, dtype)

    return check


def triton_loss(inputs: Inputs, dtype: torch.dtype) -> None:
    with backends.use_backend("triton"):
        check_loss("triton", inputs, 5003, dtype)


def check_loss(backend: str, inputs: Inputs, vocab: int, dtype: torch.dtype) -> None:
    """Rows of odd width, whose gradient is scaled by an upstream as well."""
    rows = inputs.rows(2, vocab, dtype)
    upstream = loss_cases.upstreams(inputs, 2, torch.device("cpu"))
    loss_cases.check(Backend(backend, torch.device("cpu")), rows, upstream)
    equal = rows._replace(reference=rows.logits.clone())
    _, faithfulness, gradient = loss_cases.fused(equal, (torch.zeros(2), torch.ones(2)))
    assert not faithfulness.any()
    assert not gradient.any()


def on_backend(name: str, check: Claim) -> Claim:
    def checked(inputs: Inputs, dtype: torch.dtype) -> None:
        with emulated_backend(SMALL) if name == "cuda" else backends.use_backend(name):
            check(inputs, dtype)

    return checked


def close(got: list[Tensor], exact: list[Tensor]) -> None:
    """To an ulp of the result, and to the roundings of a sum of a few hundred terms in float32."""
    for value, right in zip(got, exact, strict=True):
        rtol = max(torch.finfo(value.dtype).eps, 1e-5)
        torch.testing.assert_close(value.double(), right.double(), rtol=rtol, atol=2e-5)


def scale(inputs: Inputs, dtype: torch.dtype) -> None:
    """One token per group of rows, heads across warps, and widths that no vector divides."""
    x, alpha, shift = inputs.normal(3, 5, 3, 100, dtype=dtype), inputs.normal(2, 5, 3), inputs.normal(2, 5, 3, 100)
    rest = {"strength": inputs.normal(3), "group": torch.tensor([1, 0, 1])}
    dy = inputs.normal(*x.shape, dtype=dtype)
    against_reference(lambda x, alpha, shift: ops.scale_heads(x, alpha, shift=shift, **rest), (x, alpha, shift), dy)


def against_reference(run: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> None:
    """The result and the gradients of all leaves against the reference in float64."""
    results = []
    for name in (backends.get_backend(), "reference"):
        wide = name == "reference"
        given = [(t.double() if wide else t.detach().clone()).requires_grad_() for t in leaves]
        with backends.use_backend(name):
            y = run(*given)
            results.append([y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))])
    close(*results)


def dynamic(inputs: Inputs, dtype: torch.dtype) -> None:
    dynamic_cases.check(dynamic_cases.arguments(inputs, dynamic_cases.Shape(2, 5, 3, 100), dtype))


def channels(inputs: Inputs, dtype: torch.dtype) -> None:
    x, weight, dy = inputs.normal(37, 100, dtype=dtype), inputs.normal(100), inputs.normal(37, 100, dtype=dtype)
    against_reference(ops.scale_channels, (x, weight), dy)


def hidden_states(inputs: Inputs, dtype: torch.dtype) -> None:
    head = linear_cases.head(inputs, (5, 203, 24), dtype)
    linear_cases.check(head, loss_cases.upstreams(inputs, 5, torch.device("cpu")))


def optimiser(inputs: Inputs, dtype: torch.dtype) -> None:
    """In float32 whatever the dtype of the model."""
    start, gradient, results = inputs.normal(1500, scale=0.1), inputs.normal(1500), []
    options = {"lr": 0.03, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "l1": 0.6}
    kernel = backend_module().proximal_adam_
    for wide in (False, True):
        state = [
            t.to(torch.float64 if wide else torch.float32)
            for t in (start.clone(), gradient, *torch.zeros(2, 1500), torch.tensor(0.0))
        ]
        for _ in range(2):
            if wide:
                reference.proximal_adam_(*state, **options)
            else:
                kernel(*state, *options.values())
        results.append(state)
    close(*results)


def backend_module() -> Any:
    from actscale_fast.ops import cuda, triton

    return {"cuda": cuda, "triton": triton}[backends.get_backend()]


CLAIMS: dict[str, Claim] = {
    "cuda/loss_one_block": cuda_loss(1),
    "cuda/loss_cluster": cuda_loss(4),
    "cuda/loss_read_twice": cuda_loss(0),
    "cuda/scale": on_backend("cuda", scale),
    "cuda/dynamic": on_backend("cuda", dynamic),
    "cuda/channels": on_backend("cuda", channels),
    "cuda/optimiser": on_backend("cuda", optimiser),
    "triton/loss": triton_loss,
    "triton/scale": on_backend("triton", scale),
    "triton/dynamic": on_backend("triton", dynamic),
    "triton/channels": on_backend("triton", channels),
    "triton/hidden_states": on_backend("triton", hidden_states),
    "triton/optimiser": on_backend("triton", optimiser),
}


class Fault(NamedTuple):
    name: str
    kernel: str
    claim: str
    edit: Edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda kernel: second(first(kernel))


def copies(i: Instruction) -> bool:
    return i.name == "cp" and len(i.operands) > 1


BARRIER, SHUFFLE, COPY = opcode("bar", "sync"), opcode("shfl", "bfly"), copies
WAIT, ARRIVE = opcode("barrier", "cluster", "wait"), opcode("barrier", "cluster", "arrive")
ONE_BLOCK, CLUSTER, RING = "cuda/loss_one_block", "cuda/loss_cluster", "cuda/loss_read_twice"
LOSS, ADAM, DYNAMIC = (f"cuda/{name}_kernel" for name in ("intervention_loss", "proximal_adam", "dynamic_scale"))
HEADS_CUDA, HEADS_BACKWARD = "cuda/scale_heads_kernel", "cuda/scale_heads_backward_kernel"
SCAN, FINISH = (f"triton/intervention_loss_{name}_kernel" for name in ("scan", "finish"))
HEADS, CHANNELS, TRITON_DYNAMIC, TRITON_ADAM = (
    f"triton/{name}_kernel" for name in ("scale_heads_fwd", "scale_channels_fwd", "dynamic_scale_fwd", "proximal_adam")
)
FAULTS = [
    # What orders the threads
    Fault("no_barrier_of_the_block", LOSS, ONE_BLOCK, edit(BARRIER, left_out)),
    Fault("no_first_wait_of_the_cluster", LOSS, CLUSTER, edit(WAIT, left_out, 0)),
    Fault("no_last_wait_of_the_cluster", LOSS, CLUSTER, edit(WAIT, left_out, 1)),
    Fault("no_arrival_at_the_cluster", LOSS, CLUSTER, edit(ARRIVE, left_out, 0)),
    Fault("no_barrier_before_a_block_ends", LOSS, CLUSTER, both(edit(ARRIVE, left_out, 1), edit(WAIT, left_out, 1))),
    Fault("one_block_for_all", LOSS, CLUSTER, edit(opcode("mapa"), with_operand(2, 0))),
    Fault("no_wait_for_a_copy", LOSS, ONE_BLOCK, edit(opcode("cp", "wait_group"), left_out)),
    Fault("one_copy_too_few_awaited", LOSS, RING, edit(opcode("cp", "wait_group"), increased(0))),
    Fault("no_commit_of_a_copy", LOSS, ONE_BLOCK, edit(opcode("cp", "commit_group"), left_out)),
    Fault("no_barrier_before_the_step_is_counted", ADAM, "cuda/optimiser", edit(BARRIER, left_out)),
    Fault("no_barrier_in_dalpha", HEADS_BACKWARD, "cuda/scale", edit(BARRIER, left_out)),
    Fault("no_barrier_in_a_dot_product", DYNAMIC, "cuda/dynamic", edit(BARRIER, left_out)),
    Fault("no_barrier_in_the_scan", SCAN, "triton/loss", edit(BARRIER, left_out)),
    Fault("no_barrier_in_the_second_pass", FINISH, "triton/loss", edit(BARRIER, left_out)),
    # What lanes exchange
    Fault("swapped_lanes", LOSS, ONE_BLOCK, edit(SHUFFLE, with_operand(-3, 1))),
    Fault("swapped_lanes_in_the_scan", SCAN, "triton/loss", edit(SHUFFLE, with_operand(-3, 1))),
    Fault("one_lane_for_all", TRITON_DYNAMIC, "triton/dynamic", edit(SHUFFLE, renamed("bfly", "idx"))),
    # What is never written
    Fault("uninitialised_shared_memory", HEADS_BACKWARD, "cuda/scale", edit(access("st", "shared"), left_out)),
    Fault("uninitialised_shared_memory_of_the_loss", LOSS, ONE_BLOCK, edit(access("st", "shared"), left_out)),
    Fault("uninitialised_shared_memory_of_triton", FINISH, "triton/loss", edit(access("st", "shared"), left_out)),
    Fault("a_copy_left_out", LOSS, ONE_BLOCK, edit(COPY, left_out)),
    # Masks and tails
    Fault("a_store_without_its_mask", HEADS, "triton/scale", edit(guarded(access("st", "global")), always)),
    Fault("a_load_without_its_mask", SCAN, "triton/loss", edit(guarded(access("ld", "global")), always)),
    Fault("a_mask_the_wrong_way", CHANNELS, "triton/channels", edit(guarded(access("ld", "global")), otherwise)),
    Fault("an_update_without_its_mask", TRITON_ADAM, "triton/optimiser", edit(guarded(access("st", "global")), always)),
    Fault("a_tail_one_longer", HEADS, "triton/scale", edit(opcode("setp", "lt", "s32"), renamed("lt", "le"))),
    Fault("a_row_one_longer", FINISH, "triton/loss", edit(opcode("setp", "lt", "s32"), renamed("lt", "le"))),
    Fault("a_column_too_many", LOSS, ONE_BLOCK, edit(opcode("setp", "ge", "s32"), renamed("ge", "gt"))),
    # Addresses
    Fault("stores_one_vector_further", HEADS_CUDA, "cuda/scale", edit(access("st", "global"), moved(16))),
    Fault("loads_one_element_before", HEADS_CUDA, "cuda/scale", edit(access("ld", "global"), moved(-4))),
    Fault("gradients_one_element_further", LOSS, ONE_BLOCK, edit(access("st", "global"), moved(4))),
    Fault("vectors_off_their_grid", FINISH, "triton/loss", edit(access("ld", "global", "v4"), moved(4))),
    Fault("shared_memory_of_the_neighbour", DYNAMIC, "cuda/dynamic", edit(access("ld", "shared"), moved(4))),
    Fault("copies_off_their_grid", LOSS, ONE_BLOCK, edit(COPY, moved(8))),
    # Values
    Fault("a_minimum_for_a_maximum", LOSS, ONE_BLOCK, edit(opcode("max", "f32"), renamed("max", "min"))),
    Fault("an_exponential_left_out", SCAN, "triton/loss", edit(opcode("ex2"), renamed("ex2", "abs"))),
]


def require(backend: str) -> None:
    if backend == "cuda" and not cuda_hook.is_available():
        pytest.skip("nvcc is not on PATH")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("claim", CLAIMS)
def test_without_a_fault_the_claim_holds(inputs: Inputs, claim: str, dtype: torch.dtype) -> None:
    require(claim.partition("/")[0])
    CLAIMS[claim](inputs, dtype)


def test_the_documentation_lists_every_fault() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text()
    assert {fault.name.replace("_", " ") for fault in FAULTS} == set(re.findall(r"^\| ([a-z ]+) \| `", text, re.M))
    assert f"{len(FAULTS)} of {len(FAULTS)}" in text


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_fault_is_caught(inputs: Inputs, fault: Fault) -> None:
    require(fault.kernel.partition("/")[0])
    with edited(fault.kernel, fault.edit), pytest.raises((PtxError, AssertionError)) as caught:
        CLAIMS[fault.claim](inputs, torch.float32)
    print(f"{fault.name}: {type(caught.value).__name__}: {str(caught.value)[:300]}")
