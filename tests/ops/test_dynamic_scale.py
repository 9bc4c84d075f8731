"""dynamic_scale: values and gradients, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_cases import Shape, arguments, check, fused, over
from op_cases import DTYPES, Backend, Inputs
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import registry

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [Shape(1, 1, 1, 1), Shape(3, 5, 2, 3), Shape(2, 4, 3, 31, 3), Shape(4, 1, 5, 64, 4), Shape(5, 3, 1, 80, 2)]
NATIVE_SHAPES = [Shape(9, 40, 9, 64, 2), Shape(2, 129, 8, 128), Shape(3, 30, 1, 4099)]


@over(dtypes=DTYPES, shapes=SHAPES, native_shapes=NATIVE_SHAPES)
def test_values_and_gradients_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: Shape, inputs: Inputs
) -> None:
    check(arguments(inputs, shape, dtype).to(backend.device))


@over(shapes=[Shape(3, 2, 2, 31), Shape(3, 4, 2, 8, 3), Shape(3, 4, 2, 8, 2)])
@pytest.mark.parametrize("absent", ["bias", "d_scalars", "row_strength", "all"])
def test_bias_upstream_of_alpha_and_strength_by_row_may_be_absent(
    backend: Backend, shape: Shape, absent: str, inputs: Inputs
) -> None:
    given = arguments(inputs, shape)
    changes: dict[str, Any] = {"bias": None, "d_scalars": None, "row_strength": -1.5}
    kept = changes if absent == "all" else {absent: changes[absent]}
    check(given._replace(**{name.removeprefix("row_"): value for name, value in kept.items()}).to(backend.device))


@over()
def test_each_row_group_has_a_probe_of_its_own(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(4, 3, 2, 9, 3))._replace(group=torch.tensor([2, 0, 2, 2]), strength=0.7)
    given = given.to(backend.device)
    assert given.bias is not None
    check(given)
    y = fused(given)[0]
    for b, g in enumerate((2, 0, 2, 2)):
        alone = ops.dynamic_scale(given.x[b : b + 1], given.weight[g], given.bias[g], strength=0.7)
        torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-6, atol=1e-6)
    for gradient in fused(given)[3:]:
        assert not gradient[1].any()  # nobody's
        assert gradient[[0, 2]].any()


@over()
def test_as_many_groups_as_rows_and_no_group_means_row_by_row(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(4, 3, 2, 8, 4)).to(backend.device)
    assert given.group is None
    named = given._replace(group=torch.arange(4, device=backend.device))
    assert all(torch.equal(a, b) for a, b in zip(fused(given), fused(named), strict=True))


@over()
def test_a_zero_probe_gives_the_bias_as_a_fixed_scalar_of_each_head(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 4, 8)).to(backend.device)
    y, alpha, *_ = fused(given._replace(weight=torch.zeros_like(given.weight)))
    assert given.bias is not None
    assert torch.equal(alpha, given.bias.expand(2, 3, 4))
    torch.testing.assert_close(y, ops.scale_heads(given.x, given.bias[:, None], strength=given.strength))


@over()
def test_a_penalty_on_the_scalars_alone_has_its_gradient(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9)).to(backend.device)
    x, weight = given.x.clone().requires_grad_(), given.weight[0].clone().requires_grad_()
    _, alpha = ops.dynamic_scale(x, weight, strength=given.strength, return_scalars=True)
    dx, dweight = torch.autograd.grad(alpha.abs().sum(), (x, weight))
    sign = (given.x * given.weight[0]).sum(-1).sign()
    torch.testing.assert_close(dx, sign[..., None] * given.weight[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dweight, (sign[..., None] * given.x).sum((0, 1)), rtol=1e-5, atol=1e-5)


@over()
def test_y_and_alpha_are_learned_from_in_one_backward_pass(
    backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9)).to(backend.device)
    calls = recorded_needs(given.x, backend, monkeypatch)
    together = fused(given)[2:]
    assert len(calls) == (backend.name != "reference")
    apart = [fused(given._replace(d_scalars=None)), fused(given._replace(dy=torch.zeros_like(given.dy)))]
    for whole, *parts in zip(together, *(part[2:] for part in apart), strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)


def recorded_needs(x: Tensor, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Filled with (need_dx, need_dweight, need_dbias) of each call of the backend's backward function."""
    calls: list[tuple[bool, ...]] = []
    if backend.name != "reference":
        module: Any = registry.module(backend.name)
        run = module.dynamic_scale_backward
        monkeypatch.setattr(
            module, "dynamic_scale_backward", lambda *given: calls.append(given[-3:]) or run(*given), raising=True
        )
    return calls


@over()
@pytest.mark.parametrize("learned", [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "bias")])
def test_only_the_gradients_asked_for_are_made_and_they_are_the_same(
    backend: Backend, learned: tuple[str, ...], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9, 2)).to(backend.device)
    expected = dict(zip(("x", "weight", "bias"), fused(given)[2:], strict=True))
    calls = recorded_needs(given.x, backend, monkeypatch)
    leaves = {name: getattr(given, name).clone().requires_grad_(name in learned) for name in expected}
    y, alpha = ops.dynamic_scale(**leaves, strength=given.strength, group=given.group, return_scalars=True)
    torch.autograd.backward((y, alpha), (given.dy, given.d_scalars))
    assert calls == [tuple(name in learned for name in expected)] * (backend.name != "reference")
    for name, leaf in leaves.items():
        if name in learned and backend.name != "reference":
            assert torch.equal(leaf.grad, expected[name])
        elif name in learned:
            torch.testing.assert_close(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@over(backends=["cpu", "triton", "cuda"])
def test_outputs_not_asked_for_are_empty(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9)).to(backend.device)
    kernels: Any = registry.module(backend.name)
    _, scalars = kernels.dynamic_scale(given.x, given.weight, given.bias, 1.0, given.strength, None)
    run = (given.dy, None, given.x, given.weight, scalars, 1.0, given.strength, None)
    full = kernels.dynamic_scale_backward(*run, True, True, True)
    for needs in ((False, True, True), (True, False, False), (False, False, True), (False, False, False)):
        for need, result, right in zip(needs, kernels.dynamic_scale_backward(*run, *needs), full, strict=True):
            assert torch.equal(result, right) if need else result.numel() == 0


@over(dtypes=DTYPES)
def test_two_runs_agree_bit_for_bit_and_a_kept_graph_repeats_itself(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(5, 7, 3, 31, 2), dtype).to(backend.device)
    leaves = [t.clone().requires_grad_() for t in given[:3] if t is not None]
    y = ops.dynamic_scale(*leaves, strength=given.strength, group=given.group)
    gradients = [torch.autograd.grad(y, leaves, given.dy * sign, retain_graph=True) for sign in (1, -1, 1)]
    y_again, _, *again = fused(given._replace(d_scalars=None))
    assert torch.equal(y, y_again)
    for first, third, other in zip(gradients[0], gradients[2], again, strict=True):
        assert torch.equal(first, third)
        assert torch.equal(first, other)


@over(
    backends=["cpu"], shapes=[Shape(6, 50, 9, 64, 2), Shape(40, 20, 9, 64), Shape(300, 1, 9, 64), Shape(2, 9, 1, 9000)]
)
def test_the_number_of_threads_changes_no_bit(backend: Backend, shape: Shape, inputs: Inputs) -> None:
    given = arguments(inputs, shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fused(given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@over()
def test_without_gradients_the_values_are_the_same_and_carry_no_graph(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9)).to(backend.device)
    y, alpha, *_ = fused(given)
    weight = given.weight.clone().requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            results = ops.dynamic_scale(given.x, weight, given.bias, strength=given.strength, return_scalars=True)
        assert not any(result.requires_grad for result in results)
        assert torch.equal(results[0], y)
        assert torch.equal(results[1], alpha)


@pytest.mark.parametrize("row_strength", [False, True])
def test_the_reference_passes_gradcheck_in_float64(row_strength: bool, inputs: Inputs) -> None:
    x, weight, bias = (inputs.normal(*s, dtype=torch.float64) for s in ((3, 2, 2, 3), (2, 2, 3), (2, 2)))
    strength: Any = inputs.normal(3, dtype=torch.float64) if row_strength else -1.0
    group = torch.tensor([1, 0, 1])

    def scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return ops.dynamic_scale(x, weight, bias, strength=strength, group=group, return_scalars=True)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert [result.dtype for result in scaled(*leaves)] == [torch.float64] * 2
    assert torch.autograd.gradcheck(scaled, leaves)
    assert torch.autograd.gradgradcheck(scaled, leaves)
