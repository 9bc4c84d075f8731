"""intervention_loss and kl_div_from_logits: values, gradients, edges and errors, on every backend that runs here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    BACKENDS,
    DTYPES,
    Backend,
    Inputs,
    Losses,
    Rows,
    assert_as_exact_as_eager,
    error_of,
    over,
    textbook_losses,
)
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import reference as formulas

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def fused(rows: Rows, upstream: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, gradient of the logits) of intervention_loss under the given upstream."""
    logits = rows.logits.detach().requires_grad_()
    e, f = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, **options)
    (gradient,) = torch.autograd.grad((e, f), logits, upstream)
    return e.detach(), f.detach(), gradient


def assert_gradient(
    gradient: Tensor, exact: Losses, eager: Losses, upstream: tuple[Tensor, Tensor], backend: Backend
) -> None:
    assert_as_exact_as_eager(
        "gradient", gradient, exact.gradient, eager.gradient,
        condition=backend.exp_error * exact.gradient_condition, scaled_by=upstream[1][:, None],
        truncated=backend.truncates(gradient.dtype),
    )  # fmt: skip


def check(backend: Backend, rows: Rows, upstream: tuple[Tensor, Tensor], **options: Any) -> None:
    """Values and gradients against float64, within twice the error of eager float32."""
    e, f, gradient = fused(rows, upstream, **options)
    exact = textbook_losses(rows, upstream, torch.float64, **options)
    eager = textbook_losses(rows, upstream, torch.float32, **options)
    assert (e.dtype, f.dtype, gradient.dtype) == (torch.float32, torch.float32, rows.logits.dtype)
    assert_as_exact_as_eager("effectiveness", e, exact.effectiveness, eager.effectiveness)
    condition = backend.exp_error * exact.value_condition
    assert_as_exact_as_eager("faithfulness", f, exact.faithfulness, eager.faithfulness, condition=condition)
    assert_gradient(gradient, exact, eager, upstream, backend)


def upstreams(inputs: Inputs, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return inputs.normal(n_rows).to(device), inputs.normal(n_rows).to(device)


# One token beside the answers, odd widths around the vector lengths, more rows than threads, and GPT-2's vocabulary.
SHAPES = [(1, 3), (5, 31), (3, 257)]
NATIVE_SHAPES = [(7, 1000), (3, 50257)]


@over(dtypes=DTYPES, shapes=SHAPES, native_shapes=NATIVE_SHAPES)
@pytest.mark.parametrize("exclude_answers", [True, False])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_values_and_gradients_are_as_exact_as_eager_under_random_upstream(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], exclude_answers: bool, kl: str, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype=dtype).to(backend.device)
    check(
        backend, rows, upstreams(inputs, shape[0], backend.device), margin=2.0, exclude_answers=exclude_answers, kl=kl
    )


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


@over()
def test_two_tokens_leave_nothing_for_the_kl_without_the_answers(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 2).to(backend.device)
    _, f, gradient = fused(rows, (torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)))
    assert torch.equal(f, torch.zeros_like(f))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@over(dtypes=DTYPES, shapes=[(3, 3), (4, 31), (2, 257)], native_shapes=[(2, 50257)])
@pytest.mark.parametrize("exclude_answers", [True, False])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_identity_gives_exactly_zero_loss_and_gradient(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], exclude_answers: bool, kl: str, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype=dtype)
    rows = rows._replace(reference=rows.logits).to(backend.device)
    upstream = upstreams(inputs, shape[0], backend.device)
    _, f, gradient = fused(rows, (torch.zeros_like(upstream[0]), upstream[1]), exclude_answers=exclude_answers, kl=kl)
    assert torch.equal(f, torch.zeros_like(f))
    if backend.name == "reference":  # autograd of log_softmax leaves p·(Σp − 1): Σp is 1 within an ulp an element
        assert gradient.abs().max() <= 16 * torch.finfo(torch.float32).eps * upstream[1].abs().max()
    else:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@over(dtypes=DTYPES)
def test_answer_columns_get_the_hinge_alone_when_they_are_excluded(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    rows = inputs.rows(6, 37, dtype=dtype).to(backend.device)
    upstream = upstreams(inputs, 6, backend.device)
    index = torch.arange(6, device=backend.device)
    e, _, gradient = fused(rows, upstream, margin=30.0)
    assert (e > 0).all()
    expected = -rows.direction * upstream[0]
    assert torch.equal(gradient[index, rows.correct], backend.rounded(expected, dtype))
    assert torch.equal(gradient[index, rows.wrong], -backend.rounded(expected, dtype))
    e, _, gradient = fused(rows, upstream, margin=-30.0)
    assert not e.any()
    assert not gradient[index, rows.correct].any()
    assert not gradient[index, rows.wrong].any()
    assert gradient.any()


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


@over()
def test_answers_count_in_both_terms_when_they_are_not_excluded(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(8, 5, scale=0.5).to(backend.device)  # answers carry much of the mass, the hinge is active
    check(backend, rows, upstreams(inputs, 8, backend.device), margin=4.0, exclude_answers=False)


@over(shapes=[(5, 1), (5, 2), (6, 257)], native_shapes=[(3, 50257)], dtypes=DTYPES)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.7])
def test_kl_div_from_logits_is_as_exact_as_eager_at_every_temperature(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], kl: str, temperature: float, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype=dtype).to(backend.device)
    upstream = (torch.zeros(shape[0]), inputs.normal(shape[0]).to(backend.device))
    logits = rows.logits.requires_grad_()
    divergence = ops.kl_div_from_logits(logits, rows.reference, temperature=temperature, kl=kl)
    (gradient,) = torch.autograd.grad(divergence, logits, upstream[1])
    options: dict[str, Any] = {"temperature": temperature, "kl": kl, "answers": False}
    exact = textbook_losses(rows, upstream, torch.float64, **options)
    eager = textbook_losses(rows, upstream, torch.float32, **options)
    condition = backend.exp_error * exact.value_condition
    assert_as_exact_as_eager("kl", divergence, exact.faithfulness, eager.faithfulness, condition=condition)
    assert_gradient(gradient, exact, eager, upstream, backend)


@over()
def test_reductions_are_sums_and_means_over_rows_with_their_gradients(backend: Backend, inputs: Inputs) -> None:
    logits, reference = (inputs.normal(2, 3, 19).to(backend.device) for _ in range(2))
    logits.requires_grad_()
    per_row = ops.kl_div_from_logits(logits, reference)
    assert per_row.shape == (2, 3)
    for reduction, expected in (("sum", per_row.sum()), ("mean", per_row.mean()), ("batchmean", per_row.mean())):
        value = ops.kl_div_from_logits(logits, reference, reduction=reduction)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@over()
def test_it_is_the_kl_of_pytorch(backend: Backend, inputs: Inputs) -> None:
    logits, reference = (inputs.normal(4, 23).to(backend.device) for _ in range(2))
    ours = ops.kl_div_from_logits(logits, reference, reduction="batchmean")
    theirs = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@over(dtypes=DTYPES)
def test_scalars_give_their_l1_norm_and_its_subgradient_zero_at_zero(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    rows = inputs.rows(3, 31, dtype=dtype).to(backend.device)
    values = inputs.normal(1, 4, 70)
    values[0, 1, ::3] = 0.0
    values[0, 2, 0] = -0.0
    scalars = values.to(backend.device).requires_grad_()
    logits = rows.logits.requires_grad_()
    options: dict[str, Any] = {"direction": rows.direction, "scalars": scalars}
    e, f, l1 = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, **options)
    condition = values.double().abs().sum()
    assert_as_exact_as_eager("l1", l1, condition, values.abs().sum(), condition=condition)
    total = e.sum() + f.sum() - 2.5 * l1
    d_logits, d_scalars = torch.autograd.grad(total, (logits, scalars))
    assert torch.equal(d_scalars, -2.5 * scalars.detach().sign())
    ones = torch.ones(3, device=backend.device)
    assert torch.equal(d_logits, fused(rows, (ones, ones))[2])
    (alone,) = torch.autograd.grad(
        ops.intervention_loss(rows.logits.detach(), rows.reference, rows.correct, rows.wrong, **options)[2], scalars
    )
    assert torch.equal(alone, scalars.detach().sign())


@over()
def test_a_token_impossible_on_both_sides_contributes_nothing(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 41)
    column = (rows.correct + 3) % 41
    column = torch.where(column == rows.wrong, (column + 1) % 41, column)
    for side in rows[:2]:
        side[torch.arange(3), column] = -torch.inf
    rows = rows.to(backend.device)
    for kl in ("forward", "reverse"):
        check(backend, rows, upstreams(inputs, 3, backend.device), kl=kl)
        gradient = fused(rows, upstreams(inputs, 3, backend.device), kl=kl)[2]
        assert (gradient[torch.arange(3), column] == 0).all()


@over()
def test_a_token_impossible_where_it_weighs_contributes_nothing(backend: Backend, inputs: Inputs) -> None:
    for kl, side in (("forward", "reference"), ("reverse", "logits")):
        rows = inputs.rows(4, 37)
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


@over()
def test_one_possible_token_on_both_sides_is_exactly_zero(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 29)._replace(correct=torch.full((3,), 1), wrong=torch.full((3,), 2))
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
def test_permuting_the_vocabulary_changes_nothing_beyond_rounding(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 523)
    order = torch.randperm(523, generator=inputs.generator)
    place = order.argsort()
    moved = Rows(
        rows.logits[:, order], rows.reference[:, order], place[rows.correct], place[rows.wrong], rows.direction
    )
    upstream = upstreams(inputs, 4, backend.device)
    e, f, gradient = fused(moved.to(backend.device), upstream)
    exact = textbook_losses(rows, upstream, torch.float64)
    eager = textbook_losses(rows, upstream, torch.float32)
    assert torch.equal(e, fused(rows.to(backend.device), upstream)[0])
    condition = backend.exp_error * exact.value_condition
    assert_as_exact_as_eager("kl", f, exact.faithfulness, eager.faithfulness, condition=condition)
    assert_gradient(gradient[:, place], exact, eager, upstream, backend)


@over(dtypes=DTYPES)
def test_two_runs_agree_bit_for_bit(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    rows = inputs.rows(5, 257, dtype=dtype).to(backend.device)
    upstream = upstreams(inputs, 5, backend.device)
    first, second = fused(rows, upstream), fused(rows, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@over(backends=["cpu"])
def test_the_number_of_threads_changes_no_bit(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(5, 20011)
    upstream = upstreams(inputs, 5, backend.device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fused(rows, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@over(dtypes=DTYPES)
def test_a_kept_graph_gives_each_upstream_its_own_gradient(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    rows = inputs.rows(4, 33, dtype=dtype).to(backend.device)
    logits = rows.logits.detach().requires_grad_()
    losses = ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction)
    first, other = upstreams(inputs, 4, backend.device), upstreams(inputs, 4, backend.device)
    gradients = [torch.autograd.grad(losses, logits, u, retain_graph=True)[0] for u in (first, other, first)]
    (last,) = torch.autograd.grad(losses, logits, other)
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], last)
    for upstream, gradient in ((first, gradients[0]), (other, gradients[1])):
        assert torch.equal(gradient, fused(rows, upstream)[2])


@over()
def test_each_term_alone_has_its_own_gradient(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(5, 29).to(backend.device)
    zero, upstream = torch.zeros(5, device=backend.device), upstreams(inputs, 5, backend.device)
    logits = rows.logits.detach().requires_grad_()
    e, f = ops.intervention_loss(
        logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction, exclude_answers=False, margin=3.0
    )
    (d_e,) = torch.autograd.grad(e, logits, upstream[0], retain_graph=True)
    (d_f,) = torch.autograd.grad(f, logits, upstream[1])
    for gradient, pair in ((d_e, (upstream[0], zero)), (d_f, (zero, upstream[1]))):
        exact = textbook_losses(rows, pair, torch.float64, exclude_answers=False, margin=3.0)
        eager = textbook_losses(rows, pair, torch.float32, exclude_answers=False, margin=3.0)
        assert_gradient(gradient, exact, eager, pair, backend)


@over()
def test_logits_used_twice_collect_both_gradients(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 23).to(backend.device)
    ones = torch.ones(4, device=backend.device)
    logits = rows.logits.detach().requires_grad_()
    arguments = (logits, rows.reference, rows.correct, rows.wrong)
    first = ops.intervention_loss(*arguments, direction=rows.direction)
    second = ops.intervention_loss(*arguments, direction=-rows.direction)
    (sum(first[0]) + sum(first[1]) + sum(second[0]) + sum(second[1]) + (logits * 0.5).sum()).backward()
    one = fused(rows, (ones, ones))[2]
    other = fused(rows._replace(direction=-rows.direction), (ones, ones))[2]
    torch.testing.assert_close(logits.grad, one + other + 0.5, rtol=1e-6, atol=1e-6)


@over()
def test_the_inputs_are_not_written_to(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31).to(backend.device)
    before = [value.clone() for value in rows]
    fused(rows, upstreams(inputs, 3, backend.device))
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


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


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("exclude_answers", [True, False])
def test_the_reference_passes_gradcheck_in_float64(kl: str, exclude_answers: bool, inputs: Inputs) -> None:
    rows = inputs.rows(3, 7, dtype=torch.float64, scale=1.0)

    def losses(logits: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"direction": rows.direction, "margin": 9.0, "kl": kl}
        return ops.intervention_loss(
            logits, rows.reference, rows.correct, rows.wrong, exclude_answers=exclude_answers, **options
        )

    assert torch.autograd.gradcheck(losses, (rows.logits.requires_grad_(),))
    assert torch.autograd.gradgradcheck(losses, (rows.logits.requires_grad_(),))


Change = Callable[[dict[str, Any]], None]


def changed(rows: Rows, **changes: Any) -> Callable[[], object]:
    arguments = {**rows._asdict(), **changes}
    logits, reference = arguments.pop("logits"), arguments.pop("reference")
    return lambda: ops.intervention_loss(logits, reference, **arguments)


@over()
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31).to(backend.device)
    ids = rows.correct
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"logits": [1.0]}, TypeError, "logits: got list, expected a floating-point tensor [N, V]"),
        ({"logits": ids}, TypeError, "logits: got dtype torch.int64, expected a floating-point tensor [N, V]"),
        ({"logits": rows.logits[0]}, ValueError, "logits: got shape (31,), expected [N, V]"),
        ({"reference": None}, TypeError, "reference_logits: got NoneType, expected a floating-point tensor [N, V]"),
        ({"reference": rows.reference[:, 1:]}, ValueError, "reference_logits: got shape (3, 30), expected (3, 31)"),
        (
            {"reference": rows.reference.bfloat16()}, TypeError,
            "reference_logits: got dtype torch.bfloat16, expected torch.float32 as logits have",
        ),
        (
            {"reference": rows.reference.clone().requires_grad_()}, ValueError,
            "reference_logits: requires a gradient, but the reference is a constant; detach it",
        ),
        (
            {"reference": rows.reference.to("meta")}, ValueError,
            f"reference_logits: got a tensor on meta, expected one on {backend.device}",
        ),
        ({"correct": [1, 2, 3]}, TypeError, "correct: got list, expected an int64 tensor [3]"),
        ({"correct": ids.float()}, TypeError, "correct: got dtype torch.float32, expected int64"),
        ({"wrong": ids[:2]}, ValueError, "wrong: got shape (2,), expected (3,)"),
        ({"wrong": ids.to("meta")}, ValueError, f"wrong: got a tensor on meta, expected one on {backend.device}"),
        ({"direction": 1.0}, TypeError, "direction: got float, expected a tensor [3]"),
        ({"direction": rows.direction[None]}, ValueError, "direction: got shape (1, 3), expected (3,)"),
        ({"kl": "both"}, ValueError, "kl: got 'both', expected 'forward' or 'reverse'"),
        ({"scalars": [0.1]}, TypeError, "scalars: got list, expected a floating-point tensor of any shape"),
        ({"scalars": ids}, TypeError, "scalars: got dtype torch.int64, expected a floating-point tensor of any shape"),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(changed(rows, **changes), kind) == message


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_on_cpu_tensors_wrong_values_are_refused_with_their_row(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31)._replace(correct=torch.tensor([4, 5, 6]), wrong=torch.tensor([7, 8, 9]))
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"correct": torch.tensor([4, 31, 6])}, "correct: row 1 has token id 31, expected 0 to 30"),
        ({"wrong": torch.tensor([7, 8, -1])}, "wrong: row 2 has token id -1, expected 0 to 30"),
        ({"wrong": torch.tensor([7, 5, 9])}, "wrong: row 1 has token id 5, the same as correct"),
        ({"direction": torch.tensor([1.0, -1.0, 0.5])}, "direction: row 2 is 0.5"),
    ]
    for changes, message in cases:
        assert error_of(changed(rows, **changes), ValueError).startswith(message)


@over(backends=["triton"])
def test_in_a_kernel_an_id_out_of_range_makes_its_row_nan_and_no_other(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 31)
    rows.correct[1], rows.wrong[2] = 31, -1
    ones = torch.ones(4, device=backend.device)
    e, f, gradient = fused(rows.to(backend.device), (ones, ones))
    for values in (e, f, gradient):
        assert values[[1, 2]].isnan().any()
        assert values[[0, 3]].isfinite().all()
    assert e[[1, 2]].isnan().all()
    assert f[[1, 2]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_kl_div_errors_name_the_argument(backend: Backend, inputs: Inputs) -> None:
    z = inputs.normal(2, 3, 5).to(backend.device)
    cases: list[tuple[tuple[Any, Any], dict[str, Any], type[Exception], str]] = [
        ((3.0, z), {}, TypeError, "logits: got float, expected a tensor [..., V]"),
        ((z, z[0]), {}, ValueError, "reference_logits: got shape (3, 5), expected (2, 3, 5)"),
        ((z, 3.0), {}, TypeError, "reference_logits: got float, expected a floating-point tensor [..., V]"),
        ((z, z), {"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a positive number"),
        (
            (z, z), {"reduction": "max"}, ValueError,
            "reduction: got 'max', expected 'none', 'sum', 'mean' or 'batchmean'",
        ),
        ((z, z), {"kl": None}, ValueError, "kl: got None, expected 'forward' or 'reverse'"),
    ]  # fmt: skip
    for arguments, options, kind, message in cases:
        assert error_of(lambda a=arguments, o=options: ops.kl_div_from_logits(*a, **o), kind) == message


@over(backends=["cpu", "triton"])  # plain PyTorch keeps its own copy of the ids
def test_answers_changed_in_place_before_the_backward_are_refused(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 9).to(backend.device)
    e, f = ops.intervention_loss(
        rows.logits.requires_grad_(), rows.reference, rows.correct, rows.wrong, direction=rows.direction, margin=30.0
    )
    rows.correct.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (e + f).sum().backward()


def test_in_the_reference_an_answer_out_of_range_makes_its_row_nan_and_no_other(inputs: Inputs) -> None:
    for width, exclude in ((9, True), (9, False), (2, True)):
        rows = inputs.rows(4, width)
        rows.correct[1], rows.wrong[2] = width, -1
        logits = rows.logits.requires_grad_()
        losses = formulas.intervention_loss(
            logits, rows.reference, rows.correct, rows.wrong, rows.direction, margin=30.0, exclude_answers=exclude
        )
        (gradient,) = torch.autograd.grad([value.sum() for value in losses], logits)
        for value in losses:
            assert value.isnan().tolist() == [False, True, True, False]
        assert gradient[[0, 3]].isfinite().all()
        assert gradient[[1, 2]].isnan().any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_number_or_a_direction_that_is_none_is_refused_by_name(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(2, 9).to(backend.device)

    def loss(**changes: Any) -> object:
        return ops.intervention_loss(*rows[:4], **{"direction": rows.direction, **changes})

    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: loss(margin=None), TypeError, "margin: got NoneType, expected a number"),
        (lambda: loss(margin=float("nan")), ValueError, "margin: got nan, expected a number"),
        (
            lambda: ops.kl_div_from_logits(rows.logits, rows.reference, temperature="1"),  # type: ignore[arg-type]
            TypeError, "temperature: got str, expected a number",
        ),
        (
            lambda: loss(direction=rows.direction.clone().requires_grad_()),
            ValueError, "direction: requires a gradient, but it is not differentiated",
        ),
        (
            lambda: loss(direction=rows.direction.to(torch.complex64)),
            TypeError, "direction: got dtype torch.complex64, expected real numbers",
        ),
    ]  # fmt: skip
    for call, kind, message in cases:
        assert error_of(call, kind) == message
