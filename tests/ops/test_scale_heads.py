"""scale_heads: values, gradients, edge cases and errors, on every backend that runs here."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from op_cases import BACKENDS, DTYPES, Backend, Inputs, assert_as_exact_as_eager, error_of, over, textbook_scale
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Shape(NamedTuple):
    rows: int  # B
    tokens: int  # T
    heads: int  # H
    dim: int  # D
    groups: int = 1  # G
    per_position: bool = False  # P = T


SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(3, 5, 2, 3, groups=2, per_position=True),
    Shape(2, 4, 3, 31, groups=2),
    Shape(4, 2, 5, 64, groups=3),
    Shape(2, 3, 4, 96, per_position=True),
]
NATIVE_SHAPES = [Shape(9, 40, 9, 64, groups=2), Shape(2, 129, 8, 128, groups=2, per_position=True)]


class Arguments(NamedTuple):
    x: Tensor
    alpha: Tensor | None
    shift: Tensor | None
    strength: float | Tensor
    group: Tensor | None
    dy: Tensor

    def to(self, device: torch.device) -> Arguments:
        return Arguments(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


def arguments(
    inputs: Inputs,
    shape: Shape,
    dtype: torch.dtype,
    *,
    alpha: bool = True,
    shift: bool = True,
    row_strength: bool = True,
) -> Arguments:
    rows, tokens, heads, dim, groups, per_position = shape
    positions = tokens if per_position else 1
    group = inputs.integers(groups, rows) if groups > 1 and groups != rows else None
    return Arguments(
        inputs.normal(rows, tokens, heads, dim, dtype=dtype),
        inputs.normal(groups, positions, heads, scale=0.5) if alpha else None,
        inputs.normal(groups, positions, heads, dim) if shift else None,
        inputs.normal(rows) if row_strength else -1.5,
        group,
        inputs.normal(rows, tokens, heads, dim, dtype=dtype),
    )


def fused(given: Arguments) -> tuple[Tensor, list[Tensor | None]]:
    """(y, [dx, dalpha, dshift]) of scale_heads."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given[:3]]
    x, alpha, shift = leaves
    y = ops.scale_heads(x, alpha, strength=given.strength, shift=shift, group=given.group)  # type: ignore[arg-type]
    there = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(y, there, given.dy))
    return y.detach(), [None if leaf is None else next(gradients) for leaf in leaves]


def check(given: Arguments) -> None:
    """y and every gradient against float64, within twice the error of eager float32."""
    y, gradients = fused(given)
    results = {}
    for dtype in (torch.float64, torch.float32):
        value, leaves = textbook_scale(*given[:5], dtype)
        there = [leaf for leaf in leaves if leaf is not None]
        derived = iter(torch.autograd.grad(value, there, given.dy.cpu().to(dtype)))
        results[dtype] = [value.detach(), *(None if leaf is None else next(derived) for leaf in leaves)]
    # What the sums of dα and dv add up: the same sums of magnitudes.
    magnitude = [None if t is None else t.detach().cpu().double().abs() for t in given[:3]]
    strength = given.strength.abs() if isinstance(given.strength, Tensor) else abs(given.strength)
    terms, leaves = textbook_scale(*magnitude, strength, given.group, torch.float64)  # type: ignore[arg-type]
    there = [leaf for leaf in leaves if leaf is not None]
    sizes = iter(torch.autograd.grad(terms, there, given.dy.cpu().double().abs()))
    conditions = [terms.detach(), *(None if leaf is None else next(sizes) for leaf in leaves)]
    names = ("y", "dx", "dalpha", "dshift")
    for name, got, exact, eager, condition in zip(
        names, (y, *gradients), results[torch.float64], results[torch.float32], conditions, strict=True
    ):
        assert (got is None) == (exact is None)
        if got is not None and exact is not None and eager is not None and condition is not None:
            assert got.dtype == (given.x.dtype if name in ("y", "dx") else torch.float32)
            assert_as_exact_as_eager(name, got, exact, eager, condition=condition)


@over(dtypes=DTYPES, shapes=SHAPES, native_shapes=NATIVE_SHAPES)
@pytest.mark.parametrize("parts", ["alpha", "shift", "both"])
def test_values_and_gradients_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: Shape, parts: str, inputs: Inputs
) -> None:
    given = arguments(inputs, shape, dtype, alpha=parts != "shift", shift=parts != "alpha")
    check(given.to(backend.device))


@over(shapes=[Shape(3, 2, 2, 31), Shape(3, 2, 2, 8, groups=3), Shape(3, 2, 2, 8, groups=4, per_position=True)])
@pytest.mark.parametrize("row_strength", [False, True])
def test_strength_is_a_number_or_one_a_row_and_groups_may_be_left_unused(
    backend: Backend, shape: Shape, row_strength: bool, inputs: Inputs
) -> None:
    check(arguments(inputs, shape, torch.float32, row_strength=row_strength).to(backend.device))


@over()
def test_groups_left_unused_get_a_zero_gradient(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 2, 2, 8, groups=4), torch.float32)
    given = given._replace(group=torch.tensor([2, 0, 2])).to(backend.device)
    check(given)
    for gradient in fused(given)[1][1:]:
        assert gradient is not None
        assert not gradient[[1, 3]].any()
        assert gradient[[0, 2]].any()


@over()
def test_as_many_groups_as_rows_and_no_group_means_row_by_row(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(4, 3, 2, 8, groups=4), torch.float32).to(backend.device)
    assert given.group is None
    named = given._replace(group=torch.arange(4, device=backend.device))
    for got, expected in zip([fused(given)[0], *fused(given)[1]], [fused(named)[0], *fused(named)[1]], strict=True):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)


@over()
def test_alpha_and_shift_may_differ_in_their_positions(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 5, 3, 7), torch.float32)
    check(given._replace(alpha=inputs.normal(1, 5, 3)).to(backend.device))
    check(given._replace(shift=inputs.normal(1, 5, 3, 7)).to(backend.device))


@over(dtypes=DTYPES)
def test_heads_transposed_in_memory_are_read_in_place_with_the_same_bits(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(2, 5, 3, 31), dtype).to(backend.device)
    y, gradients = fused(given)
    transposed = given.x.transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, T, D] in memory, as attention leaves it
    whole = torch.full((2, 5, 4, 40), torch.nan, dtype=dtype, device=backend.device)
    whole[:, :, 1:, 5:36] = given.x
    every_other = torch.zeros(2, 5, 3, 62, dtype=dtype, device=backend.device)
    every_other[..., ::2] = given.x
    for x in (transposed, whole[:, :, 1:, 5:36], every_other[..., ::2]):
        dy = given.dy.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        check(given._replace(x=x, dy=dy))
        got_y, got = fused(given._replace(x=x, dy=dy))
        assert torch.equal(got_y, y)
        if backend.name != "reference":  # the order of PyTorch's own sums follows the strides
            assert all(
                a is not None and b is not None and torch.equal(a, b) for a, b in zip(got, gradients, strict=True)
            )


@over(dtypes=DTYPES)
def test_heads_that_overlap_in_memory_are_read_in_place(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 5, 8), dtype)
    check(given._replace(x=inputs.normal(2, 3, 12, dtype=dtype).unfold(-1, 8, 1)).to(backend.device))


@over(dtypes=DTYPES)
def test_of_a_slice_of_heads_only_its_own_are_read(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    alone = inputs.normal(3, 5, 2, 16, dtype=dtype).to(backend.device)
    whole = torch.full((3, 5, 7, 16), torch.nan, dtype=dtype, device=backend.device)
    whole[:, :, 3:5] = alone
    alpha = inputs.normal(1, 1, 2).to(backend.device).requires_grad_()
    dy = inputs.normal(3, 5, 2, 16, dtype=dtype).to(backend.device)
    results = []
    for x in (alone, whole[:, :, 3:5]):
        leaf = x.detach().requires_grad_()
        y = ops.scale_heads(leaf, alpha, strength=-0.5)
        results.append((y, *torch.autograd.grad(y, (leaf, alpha), dy)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@over(backends=["cpu", "triton", "cuda"])
def test_the_bare_op_refuses_channels_that_do_not_lie_side_by_side(backend: Backend, inputs: Inputs) -> None:
    x, alpha = inputs.normal(1, 2, 3, 8).to(backend.device)[..., ::2], inputs.normal(1, 1, 3).to(backend.device)
    message = error_of(lambda: torch.ops.actscale.scale_heads(x, alpha, None, 1.0, None, None), ValueError)
    assert message == "x: got strides (48, 24, 8, 2), expected 1 over the last axis; call contiguous() first"


@over()
def test_a_negative_view_counts_with_its_sign(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8), torch.float32, shift=False).to(backend.device)
    expected_y, expected = fused(given._replace(x=-given.x))
    y, gradients = fused(given._replace(x=torch._neg_view(given.x)))
    assert torch.equal(y, expected_y)
    assert given.alpha is not None
    assert torch.equal(fused(given._replace(alpha=torch._neg_view(-given.alpha)))[0], fused(given)[0])
    for got, right in zip(gradients, expected, strict=True):
        assert (got is None) == (right is None)
        assert got is None or right is None or torch.equal(got, right)


@over()
def test_the_gradient_through_a_conjugate_is_that_of_plain_pytorch(backend: Backend, inputs: Inputs) -> None:
    x, alpha = inputs.normal(2, 3, 2, 8).to(backend.device), inputs.normal(1, 1, 2).to(backend.device)
    c = torch.complex(*(inputs.normal(2, 3, 2, 8) for _ in range(2))).to(backend.device)
    gradients = []
    for scale in (ops.scale_heads, lambda x, alpha: x * (1 + alpha)[..., None]):
        leaves = [t.clone().requires_grad_() for t in (x, alpha)]
        y = scale(*leaves)
        (torch.complex(0 * y, y).conj() * c).real.sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@over()
def test_a_zero_upstream_without_memory_gives_zero_gradients(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8), torch.float32).to(backend.device)
    zero = torch._efficientzerotensor(given.dy.shape, device=backend.device)
    for gradient in fused(given._replace(dy=zero))[1]:
        assert gradient is not None
        assert not gradient.any()


@over()
def test_a_forward_mode_derivative_is_right_or_refused(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8), torch.float32, shift=False, row_strength=False).to(backend.device)
    assert given.alpha is not None
    with forward_ad.dual_level():
        x = forward_ad.make_dual(given.x, given.dy)
        if backend.name == "reference":
            tangent = forward_ad.unpack_dual(ops.scale_heads(x, given.alpha)).tangent
            torch.testing.assert_close(tangent, given.dy * (1 + given.alpha)[..., None])
        else:
            with pytest.raises((RuntimeError, NotImplementedError)):
                ops.scale_heads(x, given.alpha)


@over(backends=["cpu"])
def test_a_torchscript_trace_computes_what_it_traced(backend: Backend, inputs: Inputs) -> None:
    x, other = inputs.normal(2, 3, 2, 8), inputs.normal(2, 3, 2, 8)
    alpha = inputs.normal(1, 1, 2)
    traced = torch.jit.trace(lambda x: ops.scale_heads(x, alpha), (x,))
    assert torch.equal(traced(other), ops.scale_heads(other, alpha))


@over(backends=["cpu", "triton", "cuda"])
@pytest.mark.parametrize("learned", ["x", "shift"])
def test_x_does_not_outlive_the_forward_where_no_gradient_of_alpha_is_wanted(
    backend: Backend, learned: str, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 8), torch.float32).to(backend.device)
    x = given.x * 1.0 if learned == "shift" else given.x.clone().requires_grad_() * 1.0
    shift = given.shift.requires_grad_() if learned == "shift" and given.shift is not None else given.shift
    y = ops.scale_heads(x, given.alpha, shift=shift)
    gone = weakref.ref(x)
    del x
    assert gone() is None
    y.sum().backward()


@over(dtypes=DTYPES)
def test_an_unaligned_base_pointer_gives_the_same_bits(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 64), dtype).to(backend.device)
    flat = [torch.empty(given.x.numel() + 1, dtype=dtype, device=backend.device)[1:] for _ in range(2)]
    x, dy = (to.view(t.shape).copy_(t) for to, t in zip(flat, (given.x, given.dy), strict=True))
    got, expected = fused(given._replace(x=x, dy=dy)), fused(given)
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@over(dtypes=DTYPES)
def test_an_expanded_upstream_counts_like_a_full_one(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(2, 3, 2, 9), dtype).to(backend.device)
    one = torch.ones((), dtype=dtype, device=backend.device).expand(2, 3, 2, 9)
    check(given._replace(dy=one))
    for a, b in zip(fused(given._replace(dy=one))[1], fused(given._replace(dy=one.contiguous()))[1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@over(dtypes=DTYPES)
def test_strength_zero_is_the_identity_bit_for_bit(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(3, 4, 2, 33, groups=3), dtype).to(backend.device)
    zero = torch.zeros(3, device=backend.device)
    for strength in (0.0, zero):
        y, gradients = fused(given._replace(strength=strength))
        assert torch.equal(y, given.x)
        assert gradients[0] is not None
        assert torch.equal(gradients[0], given.dy)
    one_row = torch.tensor([1.0, 0.0, -1.0], device=backend.device)
    y = fused(given._replace(strength=one_row))[0]
    assert torch.equal(y[1], given.x[1])
    assert not torch.equal(y[0], given.x[0])


@over(dtypes=DTYPES)
def test_alpha_minus_one_removes_a_head_exactly_and_minus_strength_doubles_it(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    x = inputs.normal(2, 3, 4, 16, dtype=dtype).to(backend.device)
    alpha = torch.zeros(1, 1, 4, device=backend.device)
    alpha[..., 2] = -1.0
    y = ops.scale_heads(x, alpha)
    assert torch.equal(y[:, :, 2], torch.zeros_like(y[:, :, 2]))
    assert torch.equal(y[:, :, [0, 1, 3]], x[:, :, [0, 1, 3]])
    assert torch.equal(ops.scale_heads(x, alpha, strength=-1.0)[:, :, 2], 2 * x[:, :, 2])


@over()
def test_the_gradient_at_zero_is_attribution_patching(backend: Backend, inputs: Inputs) -> None:
    """dL/dα at α = 0 is β·⟨h, dL/dh⟩ (the first-order effect of scaling the head)."""
    given = arguments(inputs, Shape(2, 4, 3, 8), torch.float32, shift=False, row_strength=False).to(backend.device)
    assert given.alpha is not None
    (_, dalpha, _) = fused(given._replace(alpha=torch.zeros_like(given.alpha), strength=2.0))[1]
    expected = 2.0 * (given.x * given.dy).sum((0, 1, 3))[None, None]
    torch.testing.assert_close(dalpha, expected, rtol=1e-5, atol=1e-5)


@over()
@pytest.mark.parametrize("learned", ["x", "alpha", "shift", "alpha, shift"])
def test_only_the_gradients_asked_for_are_made_and_they_are_the_same(
    backend: Backend, learned: str, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(3, 2, 2, 8), torch.float32).to(backend.device)
    leaves = {name: getattr(given, name).detach() for name in ("x", "alpha", "shift")}
    for name in learned.split(", "):
        leaves[name].requires_grad_()
    y = ops.scale_heads(leaves["x"], leaves["alpha"], strength=given.strength, shift=leaves["shift"])
    y.backward(given.dy)
    for (name, leaf), expected in zip(leaves.items(), fused(given)[1], strict=True):
        if name in learned.split(", "):
            assert leaf.grad is not None
            assert expected is not None
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-6)
        else:
            assert leaf.grad is None


@over(dtypes=DTYPES)
def test_two_runs_agree_bit_for_bit_and_a_kept_graph_repeats_itself(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, Shape(5, 7, 3, 31, groups=2), dtype).to(backend.device)
    leaves = [t.detach().requires_grad_() for t in given[:3] if t is not None]
    y = ops.scale_heads(leaves[0], leaves[1], strength=given.strength, shift=leaves[2], group=given.group)
    first = torch.autograd.grad(y, leaves, given.dy, retain_graph=True)
    torch.autograd.grad(y, leaves, -given.dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, given.dy)
    other = fused(given)
    assert torch.equal(other[0], y)
    for a, b, c in zip(first, again, other[1], strict=True):
        assert c is not None
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@over(backends=["cpu"])
def test_the_number_of_threads_changes_no_bit(backend: Backend, inputs: Inputs) -> None:
    given = arguments(inputs, Shape(6, 50, 9, 64, groups=2), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, gradients = fused(given)
            results.append([y, *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@over(dtypes=DTYPES, shapes=[(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_an_empty_activation_gives_an_empty_result_and_zero_gradients(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], inputs: Inputs
) -> None:
    x = inputs.normal(*shape, dtype=dtype).to(backend.device).requires_grad_()
    alpha = torch.ones(1, 1, shape[2], device=backend.device, requires_grad=True)
    y = ops.scale_heads(x, alpha)
    y.sum().backward()
    assert y.shape == x.shape
    assert alpha.grad is not None
    assert not alpha.grad.any()


@over(dtypes=[torch.bfloat16, torch.float16])
def test_scalars_of_a_narrow_type_get_a_gradient_of_that_type(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    x = inputs.normal(2, 3, 2, 8, dtype=dtype).to(backend.device)
    alpha = inputs.normal(1, 1, 2, dtype=dtype).to(backend.device).requires_grad_()
    ops.scale_heads(x, alpha).sum().backward()
    wide = alpha.detach().float().requires_grad_()
    ops.scale_heads(x, wide).sum().backward()
    assert alpha.grad is not None
    assert wide.grad is not None
    assert alpha.grad.dtype == dtype
    assert torch.equal(alpha.grad, wide.grad.to(dtype))


@over()
def test_a_nan_scalar_reaches_its_head_and_no_other(backend: Backend, inputs: Inputs) -> None:
    x = inputs.normal(2, 3, 4, 8).to(backend.device)
    alpha = torch.zeros(1, 1, 4, device=backend.device)
    alpha[..., 1] = torch.nan
    y = ops.scale_heads(x, alpha)
    assert y[:, :, 1].isnan().all()
    assert torch.equal(y[:, :, [0, 2, 3]], x[:, :, [0, 2, 3]])


@pytest.mark.parametrize("row_strength", [False, True])
def test_the_reference_passes_gradcheck_in_float64(row_strength: bool, inputs: Inputs) -> None:
    x, alpha, shift = (
        inputs.normal(*s, dtype=torch.float64).requires_grad_() for s in ((3, 2, 2, 3), (2, 1, 2), (2, 2, 2, 3))
    )
    strength: Any = inputs.normal(3, dtype=torch.float64) if row_strength else -1.0
    group = torch.tensor([1, 0, 1])

    def scaled(x: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
        return ops.scale_heads(x, alpha, strength=strength, shift=shift, group=group)

    assert torch.autograd.gradcheck(scaled, (x, alpha, shift))
    assert torch.autograd.gradgradcheck(scaled, (x, alpha, shift))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend) -> None:
    x, alpha = torch.ones(3, 5, 2, 4, device=backend.device), torch.ones(1, 1, 2, device=backend.device)
    shift, device = torch.ones(1, 1, 2, 4, device=backend.device), backend.device
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    cases: list[tuple[tuple[Any, Any], dict[str, Any], type[Exception], str]] = [
        (([1.0], alpha), {}, TypeError, "x: got list, expected a floating-point tensor [B, T, H, D]"),
        ((x.int(), alpha), {}, TypeError, "x: got dtype torch.int32, expected a floating-point tensor [B, T, H, D]"),
        ((x[0], alpha), {}, ValueError, "x: got shape (5, 2, 4), expected [B, T, H, D]"),
        ((x, None), {}, ValueError, "alpha, shift: both are None, expected at least one"),
        ((x, 2.0), {}, TypeError, "alpha: got float, expected a floating-point tensor [G, P, H]"),
        ((x, alpha[0]), {}, ValueError, "alpha: got shape (1, 2), expected [G, 1 or 5, 2]"),
        ((x, alpha[..., :1]), {}, ValueError, "alpha: got shape (1, 1, 1), expected [G, 1 or 5, 2]"),
        ((x, alpha.expand(1, 4, 2)), {}, ValueError, "alpha: got shape (1, 4, 2), expected [G, 1 or 5, 2]"),
        ((x, alpha), {"shift": shift[..., 0]}, ValueError, "shift: got shape (1, 1, 2), expected [G, 1 or 5, 2, 4]"),
        ((x, alpha), {"shift": shift.expand(2, 1, 2, 4)}, ValueError, "shift: got 2 groups, expected 1 as alpha has"),
        (
            (x, alpha.expand(2, 1, 2)), {}, ValueError,
            "group: got None for 2 groups and 3 rows, expected an int64 tensor [B]",
        ),
        ((x, alpha), {"group": [0, 0, 0]}, TypeError, "group: got list, expected an int64 tensor [3]"),
        ((x, alpha), {"group": ids.float()}, TypeError, "group: got dtype torch.float32, expected int64"),
        ((x, alpha), {"group": ids[:2]}, ValueError, "group: got shape (2,), expected (3,)"),
        ((x, alpha), {"strength": torch.ones(2, device=device)}, ValueError, "strength: got shape (2,), expected (3,)"),
        (
            (x, alpha), {"strength": torch.ones(3, device=device, requires_grad=True)}, ValueError,
            "strength: requires a gradient, but it is not differentiated; learn alpha instead",
        ),
        ((x, alpha), {"strength": None}, TypeError, "strength: got NoneType, expected a number"),
        ((x, alpha), {"strength": "a"}, TypeError, "strength: got str, expected a number"),
        ((x, alpha), {"strength": float("nan")}, ValueError, "strength: got nan, expected a number"),
        (
            (x, alpha), {"strength": torch.ones(3, dtype=torch.complex64, device=device)}, TypeError,
            "strength: got dtype torch.complex64, expected real numbers",
        ),
        ((x, alpha.to("meta")), {}, ValueError, f"alpha: got a tensor on meta, expected one on {device}"),
        ((x, alpha), {"shift": shift.to("meta")}, ValueError, f"shift: got a tensor on meta, expected one on {device}"),
        (
            (x, alpha), {"strength": torch.ones(3, device="meta")}, ValueError,
            f"strength: got a tensor on meta, expected one on {device}",
        ),
    ]  # fmt: skip
    for positional, options, kind, message in cases:
        assert error_of(lambda p=positional, o=options: ops.scale_heads(*p, **o), kind) == message


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("wrong", [2, -1])
def test_on_cpu_tensors_a_group_out_of_range_is_refused_with_its_row(backend: Backend, wrong: int) -> None:
    x, alpha = torch.ones(3, 5, 2, 4), torch.ones(2, 1, 2)
    message = error_of(lambda: ops.scale_heads(x, alpha, group=torch.tensor([0, wrong, 1])), ValueError)
    assert message == f"group: row 1 has group {wrong}, expected 0 to 1"


@over(backends=["triton", "cuda"])
def test_in_a_kernel_a_group_out_of_range_makes_its_row_nan_and_no_other(backend: Backend, inputs: Inputs) -> None:
    x = inputs.normal(4, 2, 2, 8).to(backend.device).requires_grad_()
    alpha = torch.ones(2, 1, 2, device=backend.device, requires_grad=True)
    y = ops.scale_heads(x, alpha, group=torch.tensor([0, 2, -1, 1], device=backend.device))
    assert y[[1, 2]].isnan().all()
    assert y[[0, 3]].isfinite().all()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[[0, 3]].isfinite().all()
    assert dx[[1, 2]].isnan().all()


def test_in_the_reference_a_group_out_of_range_makes_its_row_nan_and_no_other(inputs: Inputs) -> None:
    x, group = inputs.normal(4, 2, 2, 8).requires_grad_(), torch.tensor([0, 2, -1, 1])
    alpha, shift = torch.ones(2, 1, 2, requires_grad=True), inputs.normal(2, 1, 2, 8)
    for a, v in ((alpha, None), (None, shift), (alpha, shift)):
        y = reference.scale_heads(x, a, v, 1.0, None, group)
        assert y[[1, 2]].isnan().all()
        assert y[[0, 3]].isfinite().all()
    dx, dalpha = torch.autograd.grad(y, (x, alpha), torch.ones_like(y))
    assert dx[[1, 2]].isnan().all()
    assert dx[[0, 3]].isfinite().all()
    torch.testing.assert_close(dalpha[:, 0], x.detach()[[0, 3]].sum((1, 3)))
