"""What all Triton kernels have in common, and the step of the optimiser.

Without a GPU they run in Triton's interpreter; with one, so do CUDA graphs and tensors of more than 2³¹ elements.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DTYPES, Inputs, Rows, assert_as_exact_as_eager
from torch import Tensor

from actscale_fast.ops import reference

pytest.importorskip("triton", reason="Triton is not installed")

from triton_cases import NEEDS, loss_of, moved, scale_case

from actscale_fast.ops import triton as kernels
from actscale_fast.ops.triton import columns
from actscale_fast.ops.triton.dynamic_scale import Geometry as DynamicGeometry
from actscale_fast.ops.triton.scale_heads import TILE, Geometry

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in the interpreter
]


@pytest.mark.parametrize("size", [1, 5, 1500, 2500], ids=["one", "few", "blocks", "programs"])
def test_the_optimiser_steps_like_the_formulas(
    inputs: Inputs, device: torch.device, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actscale_fast.ops.triton.proximal_adam.ONE_PROGRAM", 2048)
    options = {"lr": 0.03, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "l1": 0.6}
    start = inputs.normal(size, scale=0.1)
    runs = {}
    for dtype in (torch.float64, torch.float32):
        state = [t.to(dtype) for t in (start.clone(), torch.zeros(size), torch.zeros(size), torch.tensor(0.0))]
        runs[dtype] = state
    got = [t.to(device) for t in (start.clone(), torch.zeros(size), torch.zeros(size), torch.tensor(0.0))]
    for _ in range(4):
        gradient, before = inputs.normal(size), runs[torch.float64][0].clone()
        for dtype, (p, m, v, step) in runs.items():
            reference.proximal_adam_(p, gradient.to(dtype), m, v, step, **options)
        p, m, v, step = got
        kernels.proximal_adam_(p, gradient.to(device), m, v, step, *options.values())
    assert got[3].item() == 4
    names = ("parameter", "exp_avg", "exp_avg_sq")
    for name, value, exact, eager in zip(names, got, runs[torch.float64], runs[torch.float32], strict=False):
        assert_as_exact_as_eager(name, value, exact, eager, condition=4 * (exact.abs() + 0.2))
    if size > 5:
        exact, first, second, _ = runs[torch.float64]
        zeros = exact == 0
        assert 0 < zeros.sum() < size
        rate = options["lr"] / ((second / (1 - options["beta2"] ** 4)).sqrt() + options["eps"])
        moved = before - rate * first / (1 - options["beta1"] ** 4)
        clear = (moved.abs() - rate * options["l1"]).abs() > 1e-6  # float32 may fall on either side of the threshold
        assert clear.sum() > 0.9 * size
        assert torch.equal((got[0].cpu() == 0)[clear], zeros[clear])


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.0), (0.9, 0.999), (0.5, 0.99999)])
def test_the_first_step_is_as_long_as_the_rate(device: torch.device, beta1: float, beta2: float) -> None:
    p, m, v = (torch.zeros(3, device=device) for _ in range(3))
    gradient = torch.tensor([2.0, -1e-3, math.nan], device=device)
    kernels.proximal_adam_(p, gradient, m, v, torch.zeros((), device=device), 0.1, beta1, beta2, 0.0, 0.0)
    assert p[:2].tolist() == pytest.approx([-0.1, 0.1], rel=1e-6)
    assert p[2].isnan()


def everything(inputs: Inputs, device: torch.device, n_rows: int = 3, width: int = 203) -> Any:
    """A call that runs every function once and returns their results."""
    rows = inputs.rows(n_rows, width, torch.bfloat16).to(device)
    case = moved(scale_case(inputs, "positions_and_groups", torch.bfloat16), device)
    dy, scalars = torch.ones_like(case["x"]), inputs.normal(40).to(device)
    d_e, d_f = inputs.normal(n_rows).to(device), inputs.normal(n_rows).to(device)
    zero = torch.zeros_like(scalars)
    probe, bias = case["shift"][:, 0].contiguous(), case["alpha"][:, 0].contiguous()

    def call() -> list[Tensor]:
        losses = loss_of(rows, scalars)
        kernels.intervention_loss_scale_(losses[2], d_e, d_f, rows.correct, rows.wrong, losses[3])
        state = [scalars.clone(), zero.clone(), zero.clone(), torch.zeros((), device=device)]
        kernels.proximal_adam_(state[0], losses[5], *state[1:], 0.1, 0.9, 0.999, 1e-8, 0.1)
        scaled = kernels.scale_heads_backward(dy, **case, **dict.fromkeys(NEEDS, True))
        y, alpha = kernels.dynamic_scale(case["x"], probe, bias, 1.0, case["row_strength"], case["group"])
        given = (dy, alpha, case["x"], probe, alpha, 1.0, case["row_strength"], case["group"])
        dynamic = kernels.dynamic_scale_backward(*given, True, True, True)
        return [*losses, *state, kernels.scale_heads(**case), *scaled, y, alpha, *dynamic]

    return call


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(inputs: Inputs, device: torch.device) -> None:
    call = everything(inputs, device)
    assert all(torch.equal(first, second) for first, second in zip(call(), call(), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 64, 130, 600, 9000])
@pytest.mark.parametrize("width", [0, 1, 31, 2047, 50257, 262144, 3_000_000])
def test_the_tiles_of_a_row_cover_it_and_no_program_is_idle(rows: int, width: int) -> None:
    for dtype in DTYPES:
        tiling = columns.Tiling.of(rows, width, dtype, (width, width), 132)
        tile = tiling.unroll * tiling.lanes * tiling.vector
        needed = width + (tiling.vector - 1 if tiling.shifted else 0)
        assert tiling.splits * tiling.tiles * tile >= needed
        assert (tiling.splits - 1) * tiling.tiles * tile < max(needed, 1)
        assert 1 <= tiling.splits <= columns.MAX_SPLITS.value


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (32, 512, 32, 128), (3, 1000, 12, 64), (2, 4096, 1, 16384), (1, 1, 7, 3)]
)
def test_the_tiles_of_an_activation_cover_it(shape: tuple[int, int, int, int]) -> None:
    _, T, H, D = shape
    geometry = Geometry.of(*shape, 132)
    assert geometry.heads * geometry.channels <= TILE
    assert geometry.head_tiles * geometry.heads >= H
    assert geometry.channel_tiles * geometry.channels >= D
    assert (geometry.chunks - 1) * geometry.steps < T <= geometry.chunks * geometry.steps


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (32, 512, 32, 128), (3, 1000, 12, 64), (4096, 1, 32, 128), (2, 9, 1, 8192), (2, 9, 3, 8193)]
)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_tiles_of_dynamic_scale_cover_the_tokens_and_whole_heads(
    shape: tuple[int, int, int, int], by_row: bool
) -> None:
    B, T, H, D = shape
    for programs_each in (4, 16):
        geometry = DynamicGeometry.of(*shape, by_row, 132, programs_each)
        spans, span = (B, T) if by_row else (1, B * T)
        assert geometry.span == span
        assert (geometry.chunks - 1) * geometry.steps < span <= geometry.chunks * geometry.steps
        assert geometry.head_tiles * geometry.heads >= H
        assert geometry.programs == spans * geometry.chunks * geometry.head_tiles
        assert geometry.wide == (geometry.channels < D)
        assert geometry.wide == (D > 8192)
        assert geometry.heads * geometry.channels <= 512 * geometry.warps <= 8192


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    device = torch.device("cuda")

    def test_a_cuda_graph_captures_every_kernel_and_replays_the_same_bits(self, inputs: Inputs) -> None:
        call = everything(inputs, self.device, 8, 50257)
        expected = call()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(2):
            for result in captured:
                result.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    @pytest.mark.parametrize("shape", [(8, 50257), (64, 128256), (700, 32000)])
    def test_real_sizes_match_the_formulas(self, inputs: Inputs, shape: tuple[int, int]) -> None:
        rows = inputs.rows(*shape, torch.bfloat16).to(self.device)
        got = loss_of(rows)
        z = rows.logits.double().requires_grad_()
        e, f = reference.intervention_loss(z, rows.reference.double(), *rows[2:4], rows.direction.double())
        (gradient,) = torch.autograd.grad((e + f).sum(), z)
        assert torch.allclose(got[0].double(), e, atol=1e-5)
        assert torch.allclose(got[1].double(), f, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got[2].double(), gradient, rtol=2**-8, atol=1e-9)
        same = loss_of(rows._replace(reference=rows.logits.clone()), margin=-1e6)
        assert all((result == 0).all() for result in same[:4])

    @pytest.mark.large
    def test_more_than_two_to_the_31_logits(self, inputs: Inputs) -> None:
        n_rows, width = 17000, 131072
        z = torch.empty(n_rows, width, dtype=torch.bfloat16, device=self.device).normal_()
        r = torch.empty_like(z).normal_()
        last = slice(n_rows - 3, n_rows)
        ids = torch.arange(n_rows, device=self.device)
        sign = torch.ones(n_rows, device=self.device)
        got = loss_of(Rows(z, r, ids, ids + 1, sign))
        tail = Rows(z[last], r[last], ids[last], ids[last] + 1, sign[last])
        e, f = reference.intervention_loss(
            tail.logits.double(), tail.reference.double(), tail.correct, tail.wrong, tail.direction.double()
        )
        assert torch.allclose(got[0][last].double(), e, atol=1e-5)
        assert torch.allclose(got[1][last].double(), f, rtol=1e-5)
        assert torch.allclose(got[2][last].float(), loss_of(tail)[2].float(), rtol=2**-7, atol=1e-9)

    @pytest.mark.large
    def test_more_than_two_to_the_31_activations(self) -> None:
        x = torch.empty(3, 6000, 32, 4096, dtype=torch.bfloat16, device=self.device).normal_()
        alpha = torch.randn(1, 1, 32, device=self.device)
        y = kernels.scale_heads(x, alpha, None, 1.0, None, None)
        assert torch.equal(y[2, -2:], reference.scale_heads(x[2:, -2:], alpha, None, 1.0, None, None)[0])
        dx, dalpha, _ = kernels.scale_heads_backward(x, x, alpha, None, 1.0, None, None, True, True, False)
        assert torch.equal(dx[2, -2:], y[2, -2:])
        exact = torch.stack([part.double().square().sum((0, 2)) for part in x.flatten(0, 1).split(500)]).sum(0)
        assert torch.allclose(dalpha.flatten().double(), exact, rtol=1e-5)

    @pytest.mark.large
    def test_more_than_two_to_the_31_activations_scaled_dynamically(self) -> None:
        x = torch.empty(3, 6000, 32, 4096, dtype=torch.bfloat16, device=self.device).normal_()
        weight = torch.randn(1, 32, 4096, device=self.device) / 64
        y, alpha = kernels.dynamic_scale(x, weight, None, 1.0, None, None)
        last, last_alpha = reference.dynamic_scale(x[2:, -2:], weight, None, 1.0, None, None)
        assert torch.allclose(alpha[2, -2:], last_alpha[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(y[2, -2:].float(), last[0].float(), rtol=2**-7, atol=1e-4)
        given = (x, None, x, weight, alpha, 1.0, None, None)
        dx, dweight, dbias = kernels.dynamic_scale_backward(*given, True, True, True)
        a = torch.cat([part.double().square().sum(-1) for part in x.flatten(0, 1).split(500)])  # [B·T, H]
        assert torch.allclose(dbias.double(), a.sum(0, keepdim=True), rtol=1e-5)
        exact = sum(
            torch.einsum("nh,nhd->hd", u, part.double())
            for u, part in zip(a.split(500), x.flatten(0, 1).split(500), strict=True)
        )
        assert torch.allclose(dweight[0].double(), exact, rtol=1e-3, atol=1e-5 * float(a.sum(0).max()))
        tail = x[2, -2:].double()
        right = tail * (1 + alpha[2, -2:, :, None].double()) + a.view(3, 6000, 32, 1)[2, -2:] * weight[0].double()
        assert torch.allclose(dx[2, -2:].double(), right, rtol=2**-7, atol=1e-3)
