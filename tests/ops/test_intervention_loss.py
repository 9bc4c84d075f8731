"""intervention_loss and kl_div_from_logits: values and gradients, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
