"""intervention_loss and kl_div_from_logits where a kernel slips: −inf, huge logits, odd layouts and sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from loss_cases import assert_gradient, check, fused, upstreams
from op_cases import (
    DTYPES,
    Backend,
    Inputs,
    Rows,
    assert_as_exact_as_eager,
    over,
    textbook_losses,
)

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@over(shapes=[(4, 2), (4, 3), (6, 31)])
def test_gradients_are_those_of_ones_when_the_upstream_is_an_expanded_one(
    backend: Backend, shape: tuple[int, int], inputs: Inputs
) -> None:
    rows = inputs.rows(*shape).to(backend.device)
    one = torch.ones((), device=backend.device)
    stride_zero = (one.expand(shape[0]), one.expand(shape[0]))
    check(backend, rows, stride_zero, margin=3.0)
    logits = rows.logits.requires_grad_()
    e, f = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, margin=3.0)
    (summed,) = torch.autograd.grad(e.sum() + f.sum(), logits)
    assert torch.equal(summed, fused(rows, stride_zero, margin=3.0)[2])


@over(dtypes=DTYPES, shapes=[2, 3, 31, 50257, 50258])
def test_every_width_of_a_row_is_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: int, inputs: Inputs
) -> None:
    rows = inputs.rows(2, shape, dtype=dtype).to(backend.device)
    check(backend, rows, upstreams(inputs, 2, backend.device), margin=2.0)


@over(dtypes=DTYPES, shapes=[1, 2, 3, 31, 50257, 50258])
def test_the_divergence_of_every_width_is_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: int, inputs: Inputs
) -> None:
    rows = inputs.rows(2, shape, dtype=dtype).to(backend.device)
    logits, upstream = rows.logits.requires_grad_(), (torch.zeros(2), inputs.normal(2).to(backend.device))
    divergence = ops.kl_div_from_logits(logits, rows.reference)
    (gradient,) = torch.autograd.grad(divergence, logits, upstream[1])
    exact, eager = (textbook_losses(rows, upstream, d, answers=False) for d in (torch.float64, torch.float32))
    condition = backend.exp_error * exact.value_condition
    assert_as_exact_as_eager("kl", divergence, exact.faithfulness, eager.faithfulness, condition=condition)
    assert_gradient(gradient, exact, eager, upstream, backend)
    if shape == 1:
        assert not divergence.any()
        assert not gradient.any()


@over(dtypes=DTYPES)
def test_a_padded_vocabulary_counts_like_the_bare_one(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    """Columns beyond the tokenizer's, at −inf on both sides: more than a vector, a tile and a block of them."""
    bare = inputs.rows(3, 2100, dtype=dtype)
    nothing = torch.full((3, 4200), -torch.inf, dtype=dtype)
    padded = bare._replace(**{side: torch.cat([getattr(bare, side), nothing], 1) for side in ("logits", "reference")})
    upstream = upstreams(inputs, 3, backend.device)
    for kl in ("forward", "reverse"):
        check(backend, padded.to(backend.device), upstream, kl=kl)
        _, _, gradient = fused(padded.to(backend.device), upstream, kl=kl)
        assert not gradient[:, 2100:].any()


@over()
def test_two_tokens_leave_nothing_for_the_kl_without_the_answers(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 2).to(backend.device)
    _, f, gradient = fused(rows, (torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)))
    assert torch.equal(f, torch.zeros_like(f))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@over(dtypes=DTYPES)
def test_the_hinge_has_no_gradient_at_its_kink(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    """Logits of a narrow type lie on a grid: a difference of exactly the margin does occur."""
    rows = inputs.rows(4, 21, dtype=dtype)
    index = torch.arange(4)
    rows.logits[index, rows.wrong] = 1.0
    rows.logits[index, rows.correct] = 1.0 + 2.0 * rows.direction.to(dtype)
    zero, one = torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)
    e, _, gradient = fused(rows.to(backend.device), (one, zero), margin=2.0)
    assert not e.any()
    assert not gradient.any()


@over(dtypes=DTYPES)
def test_a_token_impossible_on_both_sides_contributes_nothing(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    rows = inputs.rows(3, 41, dtype=dtype)
    column = (rows.correct + 3) % 41
    column = torch.where(column == rows.wrong, (column + 1) % 41, column)
    for side in rows[:2]:
        side[torch.arange(3), column] = -torch.inf
    rows = rows.to(backend.device)
    for kl in ("forward", "reverse"):
        check(backend, rows, upstreams(inputs, 3, backend.device), kl=kl)
        gradient = fused(rows, upstreams(inputs, 3, backend.device), kl=kl)[2]
        assert (gradient[torch.arange(3), column] == 0).all()


@over(dtypes=DTYPES)
def test_a_token_impossible_where_it_weighs_contributes_nothing(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    for kl, side in (("forward", "reference"), ("reverse", "logits")):
        rows = inputs.rows(4, 37, dtype=dtype)
        getattr(rows, side)[:, ::4] = -torch.inf
        rows = rows._replace(correct=torch.full((4,), 1), wrong=torch.full((4,), 2)).to(backend.device)
        check(backend, rows, upstreams(inputs, 4, backend.device), kl=kl)


@over()
def test_a_possible_token_made_impossible_costs_infinity_and_spares_the_other_rows(
    backend: Backend, inputs: Inputs
) -> None:
    for kl, side in (("forward", "logits"), ("reverse", "reference")):
        rows = inputs.rows(3, 33)._replace(correct=torch.full((3,), 1), wrong=torch.full((3,), 2))
        clean = fused(rows.to(backend.device), (torch.ones(3), torch.ones(3)), kl=kl) if backend.interpreted else None
        getattr(rows, side)[1, 7] = -torch.inf
        rows = rows.to(backend.device)
        ones = torch.ones(3, device=backend.device)
        e, f, gradient = fused(rows, (ones, ones), kl=kl)
        assert f[1] == torch.inf
        assert f[[0, 2]].isfinite().all()
        assert e.isfinite().all()
        assert gradient[[0, 2]].isfinite().all()
        if clean is not None:
            assert torch.equal(gradient[[0, 2]].cpu(), clean[2][[0, 2]])


@over()
def test_the_gradient_stays_finite_where_forward_kl_is_infinite(backend: Backend, inputs: Inputs) -> None:
    """q = 0 < p: dKL/dz = q − p is finite although the value is not; the textbook's autograd agrees."""
    rows = inputs.rows(2, 33)._replace(correct=torch.full((2,), 1), wrong=torch.full((2,), 2))
    rows.logits[0, 5] = -torch.inf
    ones = torch.ones(2)
    exact = textbook_losses(rows, (ones, ones), torch.float64)
    gradient = fused(rows.to(backend.device), (ones.to(backend.device), ones.to(backend.device)))[2]
    assert exact.gradient.isfinite().all()
    torch.testing.assert_close(gradient.cpu().double(), exact.gradient, rtol=1e-5, atol=1e-6)


@over(dtypes=DTYPES)
def test_one_possible_token_on_both_sides_is_exactly_zero(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    rows = inputs.rows(3, 29, dtype=dtype)._replace(correct=torch.full((3,), 1), wrong=torch.full((3,), 2))
    for side in rows[:2]:
        side[:, [v for v in range(29) if v not in (1, 2, 11)]] = -torch.inf
    rows = rows.to(backend.device)
    upstream = (torch.zeros(3, device=backend.device), torch.ones(3, device=backend.device))
    for kl in ("forward", "reverse"):
        _, f, gradient = fused(rows, upstream, kl=kl)
        assert torch.equal(f, torch.zeros_like(f))
        assert torch.equal(gradient, torch.zeros_like(gradient))


@over()
def test_a_nan_stays_in_its_row(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 70)
    rows.logits[1, (int(rows.correct[1]) + int(rows.wrong[1]) + 1) % 70] = torch.nan
    rows.logits[1, (int(rows.correct[1]) + 35) % 70] = torch.nan
    ones = torch.ones(3, device=backend.device)
    _, f, gradient = fused(rows.to(backend.device), (ones, ones), exclude_answers=False)
    assert f[1].isnan()
    assert f[[0, 2]].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()


@over(dtypes=DTYPES)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_answer(
    backend: Backend, dtype: torch.dtype, kl: str, inputs: Inputs
) -> None:
    rows = inputs.rows(4, 67)
    for side in rows[:2]:
        side[:, ::2], side[:, 1::2] = side[:, ::2] + 1e4, side[:, 1::2] - 1e4
        side[2] = -side[2]
    rows = rows._replace(logits=rows.logits.to(dtype), reference=rows.reference.to(dtype)).to(backend.device)
    check(backend, rows, upstreams(inputs, 4, backend.device), kl=kl)


@over()
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_common_offset_of_ten_thousand_changes_nothing(backend: Backend, kl: str, inputs: Inputs) -> None:
    rows = inputs.rows(4, 131)
    grid = Rows(
        rows.logits.mul(64).round() / 64, rows.reference.mul(64).round() / 64, *rows[2:]
    )  # exact with the offset
    moved = grid._replace(logits=grid.logits + 1e4, reference=grid.reference - 1e4).to(backend.device)
    upstream = upstreams(inputs, 4, backend.device)
    check(backend, moved, upstream, kl=kl)
    for got, expected in zip(
        fused(moved, upstream, kl=kl), fused(grid.to(backend.device), upstream, kl=kl), strict=True
    ):
        assert torch.equal(got, expected)


@over(dtypes=DTYPES)
def test_slices_of_a_wider_tensor_and_unaligned_rows_are_read_in_place(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    rows = inputs.rows(4, 61, dtype=dtype).to(backend.device)
    upstream = upstreams(inputs, 4, backend.device)
    wide = torch.full((4, 3, 61), torch.nan, dtype=dtype, device=backend.device)
    wide[:, -1] = rows.logits
    unaligned = torch.full((4 * 61 + 1,), torch.nan, dtype=dtype, device=backend.device)[1:].view(4, 61)
    unaligned.copy_(rows.reference)
    padded = torch.full((4, 67), torch.nan, dtype=dtype, device=backend.device)
    padded[:, 3:64] = rows.reference
    for logits, reference in itertools.product((rows.logits, wide[:, -1]), (unaligned, padded[:, 3:64])):
        check(backend, rows._replace(logits=logits, reference=reference), upstream)


@over()
def test_columns_may_be_strided_and_the_gradient_reaches_the_whole_storage(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 21).to(backend.device)
    upstream = upstreams(inputs, 3, backend.device)
    whole = torch.zeros(21, 3, 2, device=backend.device)
    whole[..., 1] = rows.logits.T
    whole.requires_grad_()
    reference = rows.reference.T.contiguous().T
    e, f = ops.intervention_loss(whole[..., 1].T, reference, rows.correct, rows.wrong, direction=rows.direction)
    torch.autograd.backward((e, f), upstream)
    assert whole.grad is not None
    assert torch.equal(whole.grad[..., 1].T, fused(rows, upstream)[2])
    assert not whole.grad[..., 0].any()


@over(dtypes=DTYPES)
def test_no_rows_give_no_losses_and_an_empty_gradient(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    rows = inputs.rows(0, 17, dtype=dtype).to(backend.device)
    empty = torch.zeros(0, device=backend.device)
    e, f, gradient = fused(rows, (empty, empty))
    assert e.shape == f.shape == (0,)
    assert gradient.shape == (0, 17)
    total = ops.kl_div_from_logits(rows.logits.requires_grad_(), rows.reference, reduction="sum")
    assert total == 0


@over()
def test_no_rows_still_sum_the_scalars(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(0, 17).to(backend.device)
    scalars = inputs.normal(2, 3).to(backend.device).requires_grad_()
    for some in (scalars, torch.empty(0, device=backend.device, requires_grad=True)):
        options: dict[str, Any] = {"direction": rows.direction, "scalars": some}
        *_, l1 = ops.intervention_loss(rows.logits, rows.reference, rows.correct, rows.wrong, **options)
        torch.testing.assert_close(l1, some.detach().abs().sum())
        (gradient,) = torch.autograd.grad(l1, some)
        assert torch.equal(gradient, some.detach().sign())


@over()
def test_without_gradients_the_values_are_the_same_and_carry_no_graph(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31).to(backend.device)
    with_graph = fused(rows, upstreams(inputs, 3, backend.device))
    logits = rows.logits.detach().requires_grad_()
    with torch.no_grad():
        e, f = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction)
    assert not e.requires_grad
    assert not f.requires_grad
    assert torch.equal(e, with_graph[0])
    torch.testing.assert_close(f, with_graph[1], rtol=1e-6, atol=1e-6)


@over(backends=["cpu", "triton"])
def test_int32_ids_and_a_float64_direction_are_taken(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31).to(backend.device)
    narrow = Rows(*rows[:2], rows.correct.int(), rows.wrong.int(), rows.direction.double())
    upstream = upstreams(inputs, 3, backend.device)
    assert all(torch.equal(a, b) for a, b in zip(fused(narrow, upstream), fused(rows, upstream), strict=True))
