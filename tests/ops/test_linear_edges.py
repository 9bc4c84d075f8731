"""The losses from hidden states where a kernel slips: odd sizes and layouts, −inf, huge logits, NaN, no rows."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from linear_cases import Head, check, head, logits_of, run, textbook
from op_cases import DTYPES, Backend, Inputs, over
from torch import Tensor

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def upstreams(inputs: Inputs, h: Head) -> tuple[Tensor, Tensor]:
    n_rows = len(h.steered)
    return inputs.normal(n_rows).to(h.steered.device), inputs.normal(n_rows).to(h.steered.device)


@over(dtypes=DTYPES, shapes=[2, 3, 31], native_shapes=[50257, 50258])
def test_every_size_of_a_vocabulary_is_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: int, inputs: Inputs
) -> None:
    h = head(inputs, (3, shape, 5), dtype, bias=True).to(backend.device)
    check(h, upstreams(inputs, h), margin=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rows_of_many_tiles_and_splits_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, inputs: Inputs, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths on and off the 16-byte grid, answers at the edges of tiles, one program a row and several."""
    module = importlib.import_module("actscale_fast.ops.triton.linear_softmax")
    if backend.interpreted:
        monkeypatch.setattr(module, "processors", lambda device: 1)
    for n_rows, vocab in ((2, 640), (3, 515), (5, 203)):
        h = head(inputs, (n_rows, vocab, 6), dtype, bias=n_rows != 3)
        h.correct[:2], h.wrong[:2] = torch.tensor([0, 63]), torch.tensor([vocab - 1, 64])
        h = h.to(backend.device)
        for exclude in (True, False):
            check(h, upstreams(inputs, h), exclude_answers=exclude)


@over(dtypes=DTYPES, shapes=[1, 2, 15, 17, 64, 100])
def test_every_width_of_a_hidden_state_is_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: int, inputs: Inputs
) -> None:
    h = head(inputs, (3, 41, shape), dtype).to(backend.device)
    check(h, upstreams(inputs, h))


@over(dtypes=DTYPES)
def test_the_distribution_over_one_token_is_that_token(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    hidden, weight = (inputs.normal(n, 6, dtype=dtype).to(backend.device) for n in (4, 1))
    ids = torch.zeros(4, dtype=torch.int64, device=backend.device)
    statistics = ops.reference_statistics(hidden, weight, ids, ids, exclude_answers=False)
    assert statistics.mean is not None
    assert statistics.entropy is not None
    torch.testing.assert_close(statistics.mean, weight.float().expand(4, 6))
    torch.testing.assert_close(statistics.entropy, torch.zeros_like(statistics.entropy), rtol=0, atol=1e-5)


@over(dtypes=DTYPES)
def test_where_only_the_answers_are_possible_the_kl_without_them_is_exactly_zero(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    """Two tokens; and many, of which the bias bans all but two."""
    for vocab in (2, 50):
        h = head(inputs, (4, vocab, 8), dtype, bias=True)
        assert h.bias is not None
        h.correct, h.wrong = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 0, 1])
        h.bias[2:] = -torch.inf
        h = h.to(backend.device)
        zero, one = torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)
        _, faithfulness, gradient = run(h, (zero, one))
        assert torch.equal(faithfulness, zero)
        assert not gradient.any()


@over(dtypes=DTYPES)
@pytest.mark.parametrize("exclude", [True, False])
def test_a_banned_token_counts_like_one_that_is_not_there(
    backend: Backend, dtype: torch.dtype, exclude: bool, inputs: Inputs
) -> None:
    """A bias of −inf, at single tokens and at more of them in a row than a block of any kernel has."""
    h = head(inputs, (5, 700, 12), dtype, bias=True)
    assert h.bias is not None
    h.correct, h.wrong = torch.arange(5), torch.arange(5) + 20
    banned = torch.zeros(700, dtype=torch.bool)
    banned[40::7] = banned[100:690] = True
    bare = Head(**{**vars(h), "weight": h.weight[~banned], "bias": h.bias[~banned]}).to(backend.device)
    h.bias[banned] = -torch.inf
    h = h.to(backend.device)
    upstream = upstreams(inputs, h)
    check(h, upstream, exclude_answers=exclude)
    for got, expected in zip(
        run(h, upstream, exclude_answers=exclude), run(bare, upstream, exclude_answers=exclude), strict=True
    ):
        step = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=max(1e-4, 2 * step), atol=max(1e-5, 4 * torch.finfo(dtype).eps))


@over(dtypes=DTYPES)
def test_a_banned_answer_costs_what_the_loss_of_logits_says(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    h = head(inputs, (4, 30, 8), dtype, bias=True)
    assert h.bias is not None
    h.correct, h.wrong = torch.tensor([3, 4, 3, 4]), torch.tensor([9, 9, 10, 11])
    h.direction = torch.tensor([1.0, 1.0, -1.0, -1.0])
    h.bias[3] = -torch.inf
    h = h.to(backend.device)
    effectiveness, faithfulness, gradient = run(h)
    z, r = (logits_of(h, hidden, torch.float32) for hidden in (h.steered, h.frozen))
    expected = ops.intervention_loss(z, r, *h.answers, direction=h.direction)
    assert effectiveness.isinf().tolist() == [True, False, False, False]
    assert not effectiveness[2]
    torch.testing.assert_close(effectiveness, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(faithfulness, expected[1], rtol=1e-4, atol=max(1e-4, 4 * torch.finfo(dtype).eps))
    assert gradient.isfinite().all()


@over(dtypes=DTYPES)
def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_answer(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    h = head(inputs, (6, 67, 16), dtype)
    for side in (h.frozen, h.steered):
        side.mul_(2e3)
    largest = logits_of(h, h.steered, torch.float64).abs().max()
    assert 5e3 < largest < 5e4
    h = h.to(backend.device)
    check(h, upstreams(inputs, h))
    check(h, upstreams(inputs, h), exclude_answers=False)


@over()
def test_a_common_offset_of_the_bias_changes_nothing(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (5, 600, 20), bias=True)
    assert h.bias is not None
    h.bias = h.bias.mul(64).round() / 64  # exact with the offset
    moved = Head(**{**vars(h), "bias": h.bias + 1e4}).to(backend.device)
    upstream = upstreams(inputs, moved)
    check(moved, upstream)
    for got, expected in zip(run(moved, upstream), run(h.to(backend.device), upstream), strict=True):
        assert torch.equal(got, expected)


@over(dtypes=DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    backend: Backend, dtype: torch.dtype, value: float, inputs: Inputs
) -> None:
    h = head(inputs, (5, 300, 24), dtype, bias=True).to(backend.device)
    ones = torch.ones(5, device=backend.device)
    clean = run(h, (ones, ones))
    h.steered[1, 7] = h.steered[4, 0] = value
    got = run(h, (ones, ones))
    assert got[1].isnan().tolist() == [False, True, False, False, True]
    assert got[2].isnan().any(-1).tolist() == [False, True, False, False, True]
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    h = head(inputs, (3, 300, 24), dtype).to(backend.device)
    h.frozen[1, 5] = value  # of the reference
    _, faithfulness, gradient = run(h)
    assert faithfulness.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@over(dtypes=DTYPES)
def test_slices_transposes_and_unaligned_rows_are_taken(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    h = head(inputs, (4, 83, 19), dtype, bias=True).to(backend.device)
    upstream = upstreams(inputs, h)
    expected = run(h, upstream)

    def layouts(x: Tensor) -> list[Tensor]:
        n, d = x.shape
        padded = torch.full((n, d + 9), torch.nan, dtype=dtype, device=x.device)
        padded[:, 5 : 5 + d] = x
        positions = torch.full((n, 3, d), torch.nan, dtype=dtype, device=x.device)
        positions[:, -1] = x
        unaligned = torch.full((n * d + 1,), torch.nan, dtype=dtype, device=x.device)[1:].view(n, d)
        unaligned.copy_(x)
        return [padded[:, 5 : 5 + d], positions[:, -1], unaligned, x.t().contiguous().t()]

    # The bits of a product may depend on the layout where PyTorch's matrix products are called.
    step = torch.finfo(dtype).eps
    weights = layouts(h.weight)
    for steered, weight in zip(layouts(h.steered), weights[1:] + weights[:1], strict=True):
        moved = Head(**{**vars(h), "steered": steered, "weight": weight})
        check(moved, upstream)
        for got, wanted in zip(run(moved, upstream), expected, strict=True):
            if backend.name == "cpu":
                assert torch.equal(got, wanted)
            else:
                torch.testing.assert_close(got, wanted, rtol=max(1e-4, 2 * step), atol=max(1e-5, 4 * step))


@over()
def test_one_hidden_state_may_stand_for_all_rows(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (4, 50, 12)).to(backend.device)
    repeated = Head(**{**vars(h), "steered": h.steered[:1].expand(4, 12)})
    copied = Head(**{**vars(h), "steered": h.steered[:1].repeat(4, 1)})
    for got, expected in zip(run(repeated), run(copied), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@over()
def test_the_gradient_reaches_the_storage_of_a_strided_hidden_state(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 40, 10)).to(backend.device)
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    whole = torch.zeros(10, 3, 2, device=backend.device)
    whole[..., 1] = h.steered.t()
    whole.requires_grad_()
    e, f = ops.linear_intervention_loss(whole[..., 1].t(), h.weight, statistics, *h.answers, direction=h.direction)
    (e + f).sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(whole.grad[..., 1].t(), run(h)[2], rtol=1e-5, atol=1e-6)
    assert not whole.grad[..., 0].any()


@over()
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_expanded_upstream_gives_the_gradient_of_ones(
    backend: Backend, softcap: float | None, inputs: Inputs
) -> None:
    h = head(inputs, (4, 60, 12), **({} if softcap is None else {"softcap": softcap})).to(backend.device)
    one = torch.ones((), device=backend.device)
    ones = torch.ones(4, device=backend.device)
    assert torch.equal(run(h, (one.expand(4), one.expand(4)))[2], run(h, (ones, ones))[2])
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head)
    leaf = h.steered.requires_grad_()
    losses = ops.linear_intervention_loss(leaf, h.weight, statistics, *h.answers, direction=h.direction, **h.of_head)
    (summed,) = torch.autograd.grad(losses[0].sum() + losses[1].sum(), leaf, retain_graph=True)
    assert torch.equal(summed, run(h, (ones, ones))[2])
    (of_one,) = torch.autograd.grad(losses[1].sum(), leaf)  # nothing comes back to the effectiveness
    assert torch.equal(of_one, run(h, (0 * ones, ones))[2])


@over(dtypes=DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"learned": True}], ids=str)
def test_no_rows_give_no_losses_and_an_empty_gradient(
    backend: Backend, dtype: torch.dtype, options: dict[str, Any], inputs: Inputs
) -> None:
    h = head(inputs, (0, 17, 6), dtype, bias=True, **{k: v for k, v in options.items() if k == "softcap"})
    h = h.to(backend.device)
    h.weight.requires_grad_("learned" in options)
    effectiveness, faithfulness, gradient = run(h)
    assert effectiveness.shape == faithfulness.shape == (0,)
    assert gradient.shape == (0, 6)
    assert (effectiveness.dtype, gradient.dtype) == (torch.float32, dtype)
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head)
    assert len(statistics) == 0


@over()
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
def test_a_kept_graph_gives_the_same_gradient_twice(backend: Backend, options: dict[str, Any], inputs: Inputs) -> None:
    h = head(inputs, (4, 60, 12), **options).to(backend.device)
    upstream = upstreams(inputs, h)
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head)
    leaf = h.steered.requires_grad_()
    losses = ops.linear_intervention_loss(leaf, h.weight, statistics, *h.answers, direction=h.direction, **h.of_head)
    first, second = (torch.autograd.grad(losses, leaf, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (doubled,) = torch.autograd.grad(losses, leaf, tuple(2 * u for u in upstream))
    torch.testing.assert_close(doubled, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses, leaf, upstream)


@over()
def test_answers_changed_in_place_before_the_backward_are_refused(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 30, 8)).to(backend.device)
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    losses = ops.linear_intervention_loss(
        h.steered.requires_grad_(), h.weight, statistics, *h.answers, direction=h.direction
    )
    h.correct.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (losses[0] + losses[1]).sum().backward()


@over()
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"kl": "reverse"}], ids=str)
def test_without_gradients_the_values_are_the_same_and_carry_no_graph(
    backend: Backend, options: dict[str, Any], inputs: Inputs
) -> None:
    options = dict(options)
    how = {"kl": options.pop("kl")} if "kl" in options else {}
    h = head(inputs, (4, 60, 12), bias=True, **options).to(backend.device)
    with_graph = run(h, **how)

    def losses() -> tuple[Tensor, ...]:
        statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head, **how)
        return ops.linear_intervention_loss(
            h.steered, h.weight, statistics, *h.answers, direction=h.direction, **h.of_head, **how
        )

    results = [losses()]  # no gradient is asked for
    h.steered.requires_grad_()
    with torch.no_grad():
        results.append(losses())
    with torch.inference_mode():
        results.append(losses())
    for effectiveness, faithfulness in results:
        assert not effectiveness.requires_grad
        assert not faithfulness.requires_grad
        assert torch.equal(effectiveness, with_graph[0])
        torch.testing.assert_close(faithfulness, with_graph[1], rtol=1e-6, atol=1e-6)


@over()
def test_int32_ids_a_float64_direction_and_a_bias_of_another_type_are_taken(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8), bias=True)
    assert h.bias is not None
    h.bias = h.bias.bfloat16()
    wide = Head(**{**vars(h), "bias": h.bias.float()}).to(backend.device)
    narrow = Head(
        **{**vars(h), "correct": h.correct.int(), "wrong": h.wrong.int(), "direction": h.direction.double()}
    ).to(backend.device)
    upstream = upstreams(inputs, wide)
    assert all(torch.equal(a, b) for a, b in zip(run(narrow, upstream), run(wide, upstream), strict=True))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("options", [{"bias": True, "logit_scale": 0.4}, {"softcap": 3.0}], ids=str)
def test_float64_goes_through_the_reference_with_float64s_digits(
    backend: Backend, options: dict[str, Any], inputs: Inputs
) -> None:
    h = head(inputs, (5, 90, 14), torch.float64, **options)
    upstream = (inputs.normal(5).double(), inputs.normal(5).double())
    got = run(h, upstream)
    exact, gradient = textbook(h, upstream, torch.float64)
    for a, b in zip(got, (exact.effectiveness, exact.faithfulness, gradient), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
