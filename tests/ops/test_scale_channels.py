"""scale_channels: values, gradients, layouts, edge cases and errors, on every backend that runs here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from op_cases import BACKENDS, DTYPES, Backend, Inputs, assert_as_exact_as_eager, error_of, over
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1,), (7, 1), (3, 5, 31), (2, 3, 2, 64), (9, 130)]
NATIVE_SHAPES = [(70, 2048), (3, 100, 577), (20000, 33)]


class Arguments(NamedTuple):
    x: Tensor  # [..., d]
    weight: Tensor  # [d]
    dy: Tensor  # [..., d]

    def to(self, device: torch.device) -> Arguments:
        return Arguments(*(value.to(device) for value in self))


def arguments(inputs: Inputs, shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return Arguments(
        inputs.normal(*shape, dtype=dtype), inputs.normal(shape[-1]), inputs.normal(*shape, dtype=dtype)
    )  # fmt: skip


def fused(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) of scale_channels."""
    leaves = [t.detach().requires_grad_() for t in given[:2]]
    y = ops.scale_channels(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, given.dy))  # type: ignore[return-value]


def formula(given: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, computed in `dtype` on the CPU."""
    x, weight, dy = (t.detach().cpu().to(dtype) for t in given)
    return x * weight, dy * weight, (x * dy).reshape(-1, x.shape[-1]).sum(0)


def check(given: Arguments) -> None:
    """y and both gradients against float64, within twice the error of eager float32."""
    size = formula(Arguments(*(t.abs() for t in given)), torch.float64)[2]
    got, exact, eager = fused(given), formula(given, torch.float64), formula(given, torch.float32)
    for name, value, right, plain, condition in zip(
        ("y", "dx", "dw"), got, exact, eager, (0.0, 0.0, size), strict=True
    ):
        assert value.dtype == (given.weight.dtype if name == "dw" else given.x.dtype)
        assert_as_exact_as_eager(name, value, right, plain, condition=condition)


@over(dtypes=DTYPES, shapes=SHAPES, native_shapes=NATIVE_SHAPES)
def test_values_and_gradients_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], inputs: Inputs
) -> None:
    check(arguments(inputs, shape, dtype).to(backend.device))


@over(dtypes=DTYPES)
def test_the_value_is_the_product_in_float32_rounded_once(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, (4, 6, 65), dtype).to(backend.device)
    y, dx, _ = fused(given)
    assert torch.equal(y, backend.rounded(given.x.float() * given.weight, dtype))
    assert torch.equal(dx, backend.rounded(given.dy.float() * given.weight, dtype))


@over(dtypes=DTYPES)
def test_rows_of_any_stride_and_any_layout_of_the_upstream_give_the_same_bits(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, (4, 6, 31), dtype).to(backend.device)
    expected = fused(given)
    whole = torch.full((4, 6, 40), torch.nan, dtype=dtype, device=backend.device)
    whole[..., 5:36] = given.x
    every_other = torch.full((4, 12, 31), torch.nan, dtype=dtype, device=backend.device)
    every_other[:, ::2] = given.x
    tokens_first = given.x.transpose(0, 1).contiguous().transpose(0, 1)
    channels_apart = given.x.repeat_interleave(2, -1)[..., ::2]
    dy = given.dy.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for x in (whole[..., 5:36], every_other[:, ::2], tokens_first, channels_apart, given.x.flip(1).clone().flip(1)):
        assert torch.equal(x, given.x)
        for upstream in (given.dy, dy):
            for got, right in zip(fused(given._replace(x=x, dy=upstream)), expected, strict=True):
                if backend.name == "reference":  # the order of PyTorch's own sums follows the strides
                    torch.testing.assert_close(got, right)
                else:
                    assert torch.equal(got, right)
                    assert got.is_contiguous()


@over(dtypes=DTYPES)
def test_an_upstream_of_stride_zero_counts_like_a_full_one(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, (3, 5, 9), dtype).to(backend.device)
    one = torch.ones((), dtype=dtype, device=backend.device).expand(3, 5, 9)
    a_row = given.dy[0, 0].expand(3, 5, 9)
    for dy in (one, a_row):
        for a, b in zip(fused(given._replace(dy=dy)), fused(given._replace(dy=dy.contiguous())), strict=True):
            assert torch.equal(a, b)


@over(dtypes=DTYPES)
def test_an_unaligned_base_pointer_gives_the_same_bits(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, (5, 64), dtype).to(backend.device)
    flat = [torch.empty(given.x.numel() + 1, dtype=dtype, device=backend.device)[1:] for _ in range(2)]
    x, dy = (to.view(t.shape).copy_(t) for to, t in zip(flat, (given.x, given.dy), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fused(given._replace(x=x, dy=dy)), fused(given), strict=True))


@over(dtypes=DTYPES, shapes=[(0, 4), (3, 0, 4), (3, 0), (0,)])
def test_an_empty_activation_gives_an_empty_result_and_zero_gradients(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], inputs: Inputs
) -> None:
    given = arguments(inputs, shape, dtype).to(backend.device)
    y, dx, dweight = fused(given)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(given.weight))


@over(dtypes=DTYPES)
def test_factors_of_one_are_the_identity_bit_for_bit(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, (3, 4, 33), dtype).to(backend.device)
    y, dx, _ = fused(given._replace(weight=torch.ones_like(given.weight)))
    assert torch.equal(y, given.x)
    assert torch.equal(dx, given.dy)


@over(dtypes=[torch.bfloat16, torch.float16])
def test_factors_of_a_narrow_type_get_a_gradient_of_that_type_rounded_once(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, (5, 3, 8), dtype).to(backend.device)
    narrow = given._replace(weight=given.weight.to(dtype))
    wide = narrow._replace(weight=narrow.weight.float())
    for got, expected in zip(fused(narrow), fused(wide), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype))


@over()
def test_only_the_gradients_asked_for_are_made_and_they_are_the_same(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, (6, 5, 37), torch.float32).to(backend.device)
    _, dx, dweight = fused(given)
    x, weight = given.x.clone().requires_grad_(), given.weight.clone().requires_grad_()
    ops.scale_channels(x, given.weight).backward(given.dy)
    ops.scale_channels(given.x, weight).backward(given.dy)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, dx)
    assert torch.equal(weight.grad, dweight)


@over(backends=["cpu", "triton", "cuda"])
def test_x_does_not_outlive_the_forward_where_no_gradient_of_the_factors_is_wanted(
    backend: Backend, inputs: Inputs
) -> None:
    given = arguments(inputs, (3, 8), torch.float32).to(backend.device)
    x = given.x.requires_grad_() * 1.0
    y = ops.scale_channels(x, given.weight)
    gone = weakref.ref(x)
    del x
    assert gone() is None
    y.sum().backward()


@over(dtypes=DTYPES)
def test_two_runs_agree_bit_for_bit_and_a_kept_graph_repeats_itself(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, (150, 31), dtype).to(backend.device)
    leaves = [t.detach().requires_grad_() for t in given[:2]]
    y = ops.scale_channels(*leaves)
    first = torch.autograd.grad(y, leaves, given.dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, given.dy)
    for a, b, c in zip((y, *first), (y, *again), fused(given), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@over(backends=["cpu"], dtypes=DTYPES, shapes=[(40, 5000), (700, 300), (20000, 33)])
def test_neither_threads_nor_rows_read_together_change_a_bit(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], inputs: Inputs
) -> None:
    given = arguments(inputs, shape, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fused(given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_levels_of_the_processor_compute_the_same_products(dtype: torch.dtype, inputs: Inputs) -> None:
    extension = pytest.importorskip("actscale_fast.ops._C", reason="the extension was not built", exc_type=ImportError)
    from actscale_fast.ops import cpu

    given, before = arguments(inputs, (70, 579), dtype), extension.level()
    results = []
    try:
        for level in extension.levels():
            extension.set_level(level)
            y = cpu.scale_channels(given.x, given.weight)
            results.append((y, *cpu.scale_channels_backward(given.dy, given.x, given.weight, True, True)))
    finally:
        extension.set_level(before)
    for y, dx, dweight in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])
        torch.testing.assert_close(dweight, results[0][2], rtol=1e-5, atol=1e-4)  # fmadd where the level has it


@over()
def test_a_nan_factor_reaches_its_channel_and_no_other(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, (5, 40), torch.float32).to(backend.device)
    weight = given.weight.clone()
    weight[33] = torch.nan
    y, dx, dweight = fused(given._replace(weight=weight))
    assert y[:, 33].isnan().all()
    assert dx[:, 33].isnan().all()
    assert y.isnan().sum() == dx.isnan().sum() == 5
    assert dweight.isfinite().all()


@over()
def test_the_result_is_contiguous_however_x_lies(backend: Backend, inputs: Inputs) -> None:
    x, weight = inputs.normal(3, 4, 6).to(backend.device), inputs.normal(6).to(backend.device)
    for some in (x, x.transpose(0, 1), x[:, :2], inputs.normal(6, 4, 3).to(backend.device).permute(2, 1, 0)):
        y = ops.scale_channels(some, weight)
        assert y.is_contiguous()
        assert torch.equal(y, some * weight)


@over()
def test_a_negative_view_counts_with_its_sign(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, (5, 9), torch.float32).to(backend.device)
    flipped = given._replace(x=torch._neg_view(-given.x), weight=torch._neg_view(-given.weight))
    assert all(torch.equal(a, b) for a, b in zip(fused(flipped), fused(given), strict=True))


def test_the_reference_passes_gradcheck_in_float64(inputs: Inputs) -> None:
    x, weight = (inputs.normal(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 2, 5), (5,)))
    assert torch.autograd.gradcheck(ops.scale_channels, (x, weight))
    assert torch.autograd.gradgradcheck(ops.scale_channels, (x, weight))


@over(backends=["cpu", "triton", "cuda"])
def test_the_bare_op_refuses_channels_that_do_not_lie_side_by_side(backend: Backend, inputs: Inputs) -> None:
    x, weight = inputs.normal(2, 3, 8).to(backend.device)[..., ::2], inputs.normal(4).to(backend.device)
    message = error_of(lambda: torch.ops.actscale.scale_channels(x, weight), ValueError)
    assert message == "x: got strides (24, 8, 2), expected contiguous or [N, d] with stride 1 over d"


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend) -> None:
    x, weight = torch.ones(3, 5, device=backend.device), torch.ones(5, device=backend.device)
    cases: list[tuple[tuple[Any, Any], type[Exception], str]] = [
        (([1.0], weight), TypeError, "x: got list, expected a floating-point tensor [..., d]"),
        ((x.int(), weight), TypeError, "x: got dtype torch.int32, expected a floating-point tensor [..., d]"),
        ((x[0, 0], weight), ValueError, "x: got shape (), expected [..., d]"),
        ((x, 2.0), TypeError, "weight: got float, expected a floating-point tensor [d]"),
        ((x, weight[:4]), ValueError, "weight: got shape (4,), expected (5,)"),
        ((x, weight[None]), ValueError, "weight: got shape (1, 5), expected (5,)"),
        ((x, weight.to("meta")), ValueError, f"weight: got a tensor on meta, expected one on {backend.device}"),
    ]
    for given, kind, message in cases:
        assert error_of(lambda g=given: ops.scale_channels(*g), kind) == message


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """A graph compiled for one backend is not reused for the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@over(backends=["cpu"] + ["triton"] * torch.cuda.is_available())
def test_opcheck_passes_for_both_ops(backend: Backend, inputs: Inputs) -> None:
    library = torch.ops.actscale
    for dtype in (torch.float32, torch.bfloat16):
        given = arguments(inputs, (3, 4, 8), dtype).to(backend.device)
        strided = inputs.normal(6, 12, dtype=dtype).to(backend.device)[:, :8]
        for x in (given.x, strided):
            leaves = (x.detach().requires_grad_(), given.weight.detach().requires_grad_())
            torch.library.opcheck(library.scale_channels.default, leaves)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                library.scale_channels_backward.default, (given.dy, given.x, given.weight.detach(), *needs)
            )


@over()
@pytest.mark.usefixtures("_fresh_compiler")
def test_it_compiles_into_one_graph_for_every_batch_size(backend: Backend, inputs: Inputs) -> None:
    def call(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return (ops.scale_channels(x * 2.0, weight) * dy).sum() + ops.scale_channels(x[..., 1:], weight[1:]).sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        given = arguments(inputs, (rows, 4, 9), torch.float32).to(backend.device)
        leaves = [t.requires_grad_() for t in given[:2]]
        results = []
        for function in (call, compiled):
            value = function(*leaves, given.dy)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
