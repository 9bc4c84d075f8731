"""proximal_adam_: Adam with exact zeros, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import BACKENDS, Backend, Inputs, assert_as_exact_as_eager, error_of, over
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class State:
    """A parameter with its Adam moments, and the update by the textbook in any dtype beside it."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter.clone()
        self.moments = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        self.step = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def update(self, gradient: Tensor, **options: Any) -> None:
        ops.proximal_adam_(self.parameter, gradient, *self.moments, self.step, **options)


def textbook(
    parameter: Tensor, gradients: list[Tensor], dtype: torch.dtype, *, lr: float, l1: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """Kingma & Ba's algorithm 1, then argmin_w λ|w| + (w − w')²/(2·rate) in closed form, element by element."""
    value = parameter.to(dtype)
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    for t, gradient in enumerate((g.to(dtype) for g in gradients), start=1):
        m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
        rate = lr / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        value = value - rate * m / (1 - betas[0] ** t)
        threshold = rate * l1
        value = torch.where(
            value > threshold, value - threshold, torch.where(value < -threshold, value + threshold, 0.0)
        )
    return value


@over(shapes=[(1,), (7,), (1, 30, 9)], native_shapes=[(3, 5, 4099)])
@pytest.mark.parametrize("l1", [0.0, 0.05])
def test_several_steps_are_as_exact_as_eager(
    backend: Backend, shape: tuple[int, ...], l1: float, inputs: Inputs
) -> None:
    start = inputs.normal(*shape, scale=0.1)
    gradients = [inputs.normal(*shape, scale=0.3) for _ in range(4)]
    state = State(start.to(backend.device))
    for gradient in gradients:
        state.update(gradient.to(backend.device), lr=0.03, l1=l1)
    exact = textbook(start, gradients, torch.float64, lr=0.03, l1=l1)
    eager = textbook(start, gradients, torch.float32, lr=0.03, l1=l1)
    condition = start.double().abs() + 4 * 0.03 * (1 + l1)  # what the four steps add up
    assert_as_exact_as_eager("parameter", state.parameter, exact, eager, condition=condition)
    assert float(state.step) == 4.0


@over()
def test_without_l1_it_is_the_adam_of_pytorch(backend: Backend, inputs: Inputs) -> None:
    start = inputs.normal(5, 11).to(backend.device)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    state = State(start)
    for _ in range(3):
        theirs.grad = inputs.normal(5, 11).to(backend.device)
        state.update(theirs.grad, lr=0.02, betas=(0.8, 0.95), eps=1e-6)
        optimizer.step()
    torch.testing.assert_close(state.parameter, theirs.detach(), rtol=1e-5, atol=1e-6)


@over()
def test_small_scalars_become_exactly_zero_and_stay_there_under_a_weak_gradient(
    backend: Backend, inputs: Inputs
) -> None:
    gradient = torch.tensor([0.1, -0.1, 0.1, 0.0]).to(backend.device)
    state = State(torch.tensor([0.001, -0.001, 5.0, 0.0]).to(backend.device))
    for _ in range(3):
        state.update(gradient, lr=0.01, l1=0.2)  # λ exceeds the gradient: |m̂| < λ
    assert torch.equal(state.parameter[[0, 1, 3]].cpu(), torch.zeros(3))
    assert state.parameter[2] > 4


@over()
def test_a_strong_gradient_leaves_zero(backend: Backend) -> None:
    state = State(torch.zeros(1, device=backend.device))
    state.update(torch.full((1,), -1.0, device=backend.device), lr=0.01, l1=0.2)
    # first step: m̂/√v̂ is the sign, so the step is lr·(1 − λ/|g|)
    torch.testing.assert_close(state.parameter.cpu(), torch.tensor([0.01 * 0.8]), rtol=1e-5, atol=0)


@over()
def test_the_step_counter_lives_on_the_device_and_drives_the_bias_correction(backend: Backend, inputs: Inputs) -> None:
    gradient = inputs.normal(6).to(backend.device)
    straight = State(torch.zeros(6, device=backend.device))
    for _ in range(4):
        straight.update(gradient, lr=0.1, l1=0.01)
    resumed = State(torch.zeros(6, device=backend.device))
    for _ in range(2):
        resumed.update(gradient, lr=0.1, l1=0.01)
    other = State(resumed.parameter)
    other.moments, other.step = tuple(m.clone() for m in resumed.moments), resumed.step.clone()  # type: ignore[assignment]
    for _ in range(2):
        other.update(gradient, lr=0.1, l1=0.01)
    assert torch.equal(other.parameter, straight.parameter)
    assert float(other.step) == 4.0


@over()
def test_a_nan_gradient_reaches_its_own_scalar_only(backend: Backend) -> None:
    state = State(torch.ones(3, device=backend.device))
    state.update(torch.tensor([0.1, torch.nan, 0.1], device=backend.device), lr=0.01, l1=0.1)
    assert state.parameter.isnan().tolist() == [False, True, False]


@over()
def test_a_strided_gradient_is_taken_and_no_graph_is_recorded(backend: Backend, inputs: Inputs) -> None:
    gradient = inputs.normal(4, 6).to(backend.device)
    dense, strided = (State(torch.zeros(6, 4, device=backend.device)) for _ in range(2))
    strided.parameter.requires_grad_()
    dense.update(gradient.T.contiguous(), lr=0.1, l1=0.01)
    strided.update(gradient.T, lr=0.1, l1=0.01)
    assert torch.equal(dense.parameter, strided.parameter.detach())
    assert strided.parameter.grad_fn is None


@over()
def test_no_scalars_are_no_trouble(backend: Backend) -> None:
    state = State(torch.zeros(0, 3, device=backend.device))
    state.update(torch.zeros(0, 3, device=backend.device), lr=0.1)
    assert float(state.step) == 1.0


@over(backends=["cpu", "triton"])  # plain PyTorch saves 1 + β·α instead
def test_a_graph_that_saved_the_scalars_refuses_its_backward_after_the_update(backend: Backend, inputs: Inputs) -> None:
    x = inputs.normal(1, 2, 3, 4).to(backend.device).requires_grad_()
    state = State(inputs.normal(1, 1, 3).to(backend.device))
    y = ops.scale_heads(x, state.parameter.requires_grad_()).sum()
    state.update(torch.ones_like(state.parameter), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_float64_scalars_go_through_the_reference(inputs: Inputs) -> None:
    start, gradient = inputs.normal(5, dtype=torch.float64), inputs.normal(5, dtype=torch.float64)
    state = State(start)
    with ops.use_backend("reference"):
        state.update(gradient, lr=0.1, l1=0.3)
    exact = textbook(start, [gradient], torch.float64, lr=0.1, l1=0.3)
    torch.testing.assert_close(state.parameter, exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend) -> None:
    def update(**changes: Any) -> None:
        tensors = {
            name: torch.zeros(3, device=backend.device) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")
        }
        step = torch.zeros((), device=backend.device)
        options = {"lr": 0.1, **{k: v for k, v in changes.items() if k not in tensors}}
        options.setdefault("step", step)
        ops.proximal_adam_(**{**tensors, **{k: v for k, v in changes.items() if k in tensors}}, **options)

    expected = "expected lr, eps > 0, l1 >= 0, betas in [0, 1)"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"gradient": None}, TypeError, "gradient: got NoneType, expected a floating-point tensor like parameter"),
        (
            {"gradient": torch.zeros(4, device=backend.device)}, ValueError,
            "gradient: got (4,) torch.float32, expected (3,) torch.float32 as parameter is",
        ),
        (
            {"exp_avg": torch.zeros(3, dtype=torch.bfloat16, device=backend.device)}, ValueError,
            "exp_avg: got (3,) torch.bfloat16, expected (3,) torch.float32 as parameter is",
        ),
        (
            {"exp_avg_sq": torch.zeros(3, device="meta")}, ValueError,
            f"exp_avg_sq: got a tensor on meta, expected one on {backend.device}",
        ),
        ({"parameter": [0.0]}, TypeError, "parameter: got list, expected a floating-point tensor of any shape"),
        ({"step": 3}, TypeError, "step: got int, expected a float32 tensor []"),
        (
            {"step": torch.zeros(1, device=backend.device)}, ValueError,
            "step: got (1,) torch.float32, expected a float32 tensor []",
        ),
        (
            {"step": torch.zeros((), dtype=torch.int64, device=backend.device)}, ValueError,
            "step: got () torch.int64, expected a float32 tensor []",
        ),
        (
            {
                name: torch.zeros(3, dtype=torch.bfloat16, device=backend.device)
                for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")
            }, TypeError,
            "parameter: got dtype torch.bfloat16, expected float32 (float64 with the reference backend)",
        ),
        ({"lr": "a"}, TypeError, "lr: got str, expected a number"),
        ({"l1": None}, TypeError, "l1: got NoneType, expected a number"),
        ({"lr": 0.0}, ValueError, f"lr, l1, eps, betas: got 0.0, 0.0, 1e-08, (0.9, 0.999), {expected}"),
        ({"l1": -1.0}, ValueError, f"lr, l1, eps, betas: got 0.1, -1.0, 1e-08, (0.9, 0.999), {expected}"),
        ({"betas": (1.0, 0.9)}, ValueError, f"lr, l1, eps, betas: got 0.1, 0.0, 1e-08, (1.0, 0.9), {expected}"),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(lambda c=changes: update(**c), kind) == message
