"""dynamic_scale: layouts, empty and extreme inputs, groups out of range, errors, on every backend that runs here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from dynamic_cases import BACKENDS, Shape, arguments, check, fused, over
from op_cases import DTYPES, Backend, Inputs, error_of

from actscale_fast import ops
from actscale_fast.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@over()
def test_heads_wider_than_a_tile_are_walked_over_in_parts(
    backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.name == "triton":
        for name, value in (("TILE", 16), ("MAX_CHANNELS", 32)):
            monkeypatch.setattr(importlib.import_module("actscale_fast.ops.triton.dynamic_scale"), name, value)
    for shape in (Shape(2, 3, 2, 33), Shape(3, 2, 3, 70, 2), Shape(2, 9, 1, 32)):
        given = arguments(inputs, shape).to(backend.device)
        check(given)
        for first, second in zip(fused(given), fused(given), strict=True):
            assert torch.equal(first, second)


@over(dtypes=DTYPES)
def test_any_layout_of_rows_tokens_and_heads_gives_the_same_bits(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(2, 5, 3, 31), dtype).to(backend.device)
    plain = fused(given)
    transposed = given.x.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, T, D] in memory, as attention leaves it
    whole = torch.full((2, 5, 4, 40), torch.nan, dtype=dtype, device=backend.device)
    whole[:, :, 1:, 5:36] = given.x
    every_other = torch.zeros(2, 5, 3, 62, dtype=dtype, device=backend.device)
    every_other[..., ::2] = given.x
    unaligned = torch.empty(given.x.numel() + 1, dtype=dtype, device=backend.device)[1:].view(given.x.shape)
    assert given.d_scalars is not None
    dy = given.dy.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    d_scalars = given.d_scalars.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for x in (transposed, whole[:, :, 1:, 5:36], every_other[..., ::2], unaligned.copy_(given.x)):
        again = given._replace(x=x, dy=dy, d_scalars=d_scalars)
        check(again)
        if backend.name != "reference":  # the order of PyTorch's own sums follows the strides
            assert all(torch.equal(a, b) for a, b in zip(fused(again), plain, strict=True))


@over(dtypes=DTYPES)
def test_heads_that_overlap_in_memory_are_read_in_place(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 5, 8), dtype)
    check(given._replace(x=inputs.normal(2, 3, 12, dtype=dtype).unfold(-1, 8, 1)).to(backend.device))


@over(dtypes=DTYPES)
def test_an_expanded_upstream_counts_like_a_full_one(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 9), dtype).to(backend.device)
    one = torch.ones((), dtype=dtype, device=backend.device).expand(2, 3, 2, 9)
    half = torch.tensor(0.5, device=backend.device).expand(2, 3, 2)
    expanded = given._replace(dy=one, d_scalars=half)
    check(expanded)
    full = fused(given._replace(dy=one.contiguous(), d_scalars=half.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(fused(expanded), full, strict=True))


@over()
def test_a_zero_upstream_without_memory_gives_zero_gradients(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8)).to(backend.device)
    zero = torch._efficientzerotensor(given.dy.shape, device=backend.device)
    assert not any(gradient.any() for gradient in fused(given._replace(dy=zero, d_scalars=None))[2:])


@over()
def test_a_negative_view_counts_with_its_sign(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8)).to(backend.device)
    expected = fused(given._replace(x=-given.x))
    got = fused(given._replace(x=torch._neg_view(given.x)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@over(dtypes=DTYPES)
def test_strength_zero_is_the_identity_bit_for_bit(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 33, 3), dtype)._replace(d_scalars=None).to(backend.device)
    for strength in (0.0, torch.zeros(3, device=backend.device)):
        y, alpha, dx, *sums = fused(given._replace(strength=strength))
        assert torch.equal(y, given.x)
        assert torch.equal(dx, given.dy)
        assert alpha.any()
        assert not any(gradient.any() for gradient in sums)
    y = fused(given._replace(strength=torch.tensor([1.0, 0.0, -1.0], device=backend.device)))[0]
    assert torch.equal(y[1], given.x[1])
    assert not torch.equal(y[0], given.x[0])


@over(dtypes=DTYPES, shapes=[(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_an_empty_activation_gives_an_empty_result_and_zero_gradients(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int], inputs: Inputs
) -> None:
    x = inputs.normal(*shape, dtype=dtype).to(backend.device).requires_grad_()
    weight = torch.ones(shape[2:], device=backend.device, requires_grad=True)
    bias = torch.ones(shape[2], device=backend.device, requires_grad=True)
    y, alpha = ops.dynamic_scale(x, weight, bias, return_scalars=True)
    (y.sum() + 0 * alpha.sum()).backward()
    assert y.shape == x.shape
    assert torch.equal(alpha, torch.ones(shape[:3], device=backend.device))  # of no channels: the bias
    for leaf in (weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@over()
def test_the_inputs_are_not_written_to(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9, 2)).to(backend.device)
    before = [value.clone() for value in given if isinstance(value, torch.Tensor)]
    fused(given)
    after = [value for value in given if isinstance(value, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@over(dtypes=[torch.bfloat16, torch.float16])
def test_a_probe_of_a_narrow_type_gets_a_gradient_of_that_type(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8), dtype).to(backend.device)
    narrow = given.weight[0].to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    for weight in (narrow, wide):
        ops.dynamic_scale(given.x, weight).backward(given.dy)
    assert narrow.grad is not None
    assert wide.grad is not None
    assert narrow.grad.dtype == dtype
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


@over()
def test_a_nan_probe_reaches_its_head_and_no_other(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 4, 8)).to(backend.device)
    weight = given.weight[0].clone()
    weight[1, 5] = torch.nan
    y = ops.dynamic_scale(given.x, weight)
    assert y[:, :, 1].isnan().all()
    assert torch.equal(y[:, :, [0, 2, 3]], ops.dynamic_scale(given.x, given.weight)[:, :, [0, 2, 3]])


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("wrong", [2, -1, 2**40])
def test_on_cpu_tensors_a_group_out_of_range_is_refused_with_its_row(backend: Backend, wrong: int) -> None:
    x, weight = torch.ones(3, 5, 2, 4), torch.ones(2, 2, 4)
    message = error_of(lambda: ops.dynamic_scale(x, weight, group=torch.tensor([0, wrong, 1])), ValueError)
    assert message == f"group: row 1 has group {wrong}, expected 0 to 1"


@over(backends=["triton", "cuda"])
@pytest.mark.parametrize("bad", [-1, 2, 2**40, -(2**40)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_in_a_kernel_a_group_out_of_range_makes_its_row_nan_and_no_other(
    backend: Backend, has_bias: bool, bad: int, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 9, 2))._replace(group=torch.tensor([1, 0, 1]))
    given = given.to(backend.device)._replace(**({} if has_bias else {"bias": None}))
    broken = fused(given._replace(group=torch.tensor([1, bad, 1], device=backend.device)))
    for before, after in zip(fused(given)[:3], broken[:3], strict=True):
        assert after[1].isnan().all()
        assert torch.equal(after[[0, 2]], before[[0, 2]])
    for before, after in zip(fused(given)[3:], broken[3:], strict=True):
        assert torch.equal(after[1], before[1])
        assert not after[0].any()


def test_in_the_reference_a_group_out_of_range_makes_its_row_nan_and_no_other(inputs: Inputs) -> None:
    given = arguments(inputs, Shape(4, 2, 2, 8, 2))
    leaves = [t.requires_grad_() for t in given[:3] if t is not None]
    y, alpha = reference.dynamic_scale(*leaves, 1.0, None, torch.tensor([0, 2, -1, 1]))
    dx, *sums = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for values in (y, alpha, dx):
        assert values[[1, 2]].isnan().all()
        assert values[[0, 3]].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in sums)


@over(backends=["cpu", "triton", "cuda"])
def test_the_bare_op_refuses_channels_that_do_not_lie_side_by_side(backend: Backend, inputs: Inputs) -> None:
    x, weight = inputs.normal(1, 2, 3, 8).to(backend.device)[..., ::2], inputs.normal(1, 3, 4).to(backend.device)
    message = error_of(lambda: torch.ops.actscale.dynamic_scale(x, weight, None, 1.0, None, None), ValueError)
    assert message == "x: got strides (48, 24, 8, 2), expected 1 over the last axis; call contiguous() first"


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend) -> None:
    x, weight = torch.ones(3, 5, 2, 4, device=backend.device), torch.ones(2, 4, device=backend.device)
    bias, ids = weight[:, 0], torch.zeros(3, dtype=torch.int64, device=backend.device)
    groups = weight.expand(2, 2, 4)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (([1.0], weight), {}, TypeError, "x: got list, expected a floating-point tensor [B, T, H, D]"),
        ((x.int(), weight), {}, TypeError, "x: got dtype torch.int32, expected a floating-point tensor [B, T, H, D]"),
        ((x[0], weight), {}, ValueError, "x: got shape (5, 2, 4), expected [B, T, H, D]"),
        ((x, None), {}, TypeError, "weight: got NoneType, expected a floating-point tensor [H, D] or [G, H, D]"),
        ((x, weight[:1]), {}, ValueError, "weight: got shape (1, 4), expected [2, 4] or [G, 2, 4]"),
        ((x, weight[None, None]), {}, ValueError, "weight: got shape (1, 1, 2, 4), expected [2, 4] or [G, 2, 4]"),
        ((x, weight[0]), {}, ValueError, "weight: got shape (4,), expected [2, 4] or [G, 2, 4]"),
        ((x, weight, 0.5), {}, TypeError, "bias: got float, expected a floating-point tensor [H] or [G, H]"),
        ((x, weight, bias[:1]), {}, ValueError, "bias: got shape (1,), expected [2] or [G, 2]"),
        ((x, weight, bias.expand(3, 2)), {}, ValueError, "bias: got 3 groups, expected 1 as weight has"),
        ((x, groups, bias), {"group": ids}, ValueError, "bias: got 1 groups, expected 2 as weight has"),
        ((x, groups), {}, ValueError, "group: got None for 2 groups and 3 rows, expected an int64 tensor [B]"),
        ((x, weight), {"group": [0, 0, 0]}, TypeError, "group: got list, expected an int64 tensor [3]"),
        ((x, weight), {"group": ids.float()}, TypeError, "group: got dtype torch.float32, expected int64"),
        ((x, weight), {"group": ids[:2]}, ValueError, "group: got shape (2,), expected (3,)"),
        ((x, weight), {"strength": bias}, ValueError, "strength: got shape (2,), expected (3,)"),
        (
            (x, weight), {"strength": torch.ones(3, device=backend.device, requires_grad=True)}, ValueError,
            "strength: requires a gradient, but it is not differentiated; learn weight instead",
        ),
        ((x, weight), {"strength": None}, TypeError, "strength: got NoneType, expected a number"),
        ((x, weight), {"strength": float("nan")}, ValueError, "strength: got nan, expected a number"),
        ((x, weight.to("meta")), {}, ValueError, f"weight: got a tensor on meta, expected one on {x.device}"),
        ((x, weight, bias.to("meta")), {}, ValueError, f"bias: got a tensor on meta, expected one on {x.device}"),
    ]  # fmt: skip
    for positional, options, kind, message in cases:
        assert error_of(lambda p=positional, o=options: ops.dynamic_scale(*p, **o), kind) == message
