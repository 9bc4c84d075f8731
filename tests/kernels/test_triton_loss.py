"""The Triton kernels of the loss against the float64 formulas, called as the registry calls them.

Without a GPU the kernels run in Triton's interpreter; with one, the same claims are checked on real tensors.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, Inputs, Rows, assert_as_exact_as_eager, textbook_losses

pytest.importorskip("triton", reason="Triton is not installed")

from triton_cases import assert_losses_match, exact_loss, loss_of

from actscale_fast.ops import triton as kernels
from actscale_fast.ops.triton import columns

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in the interpreter
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n_rows", [2, 4], ids=["rows_split", "rows_whole"])
@pytest.mark.parametrize("width", [1, 2, 3, 31, 267])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradient_match_the_formulas(
    inputs: Inputs, device: torch.device, dtype: torch.dtype, width: int, n_rows: int
) -> None:
    rows = inputs.rows(n_rows, width, dtype)
    for exclude, reverse, answers in ((True, False, True), (False, True, True), (False, False, False)):
        options = {"exclude_answers": exclude, "reverse": reverse, "inverse_temperature": 0.8, "answers": answers}
        if width == 1 and answers:
            continue  # correct == wrong, which the public function refuses
        assert_losses_match(loss_of(rows.to(device), **options), rows, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_vocabulary_of_odd_width_matches_the_formulas(
    inputs: Inputs, device: torch.device, dtype: torch.dtype
) -> None:
    rows = inputs.rows(2, 50257, dtype)
    assert columns.Tiling.of(2, 50257, dtype, (50257, 50257, 50257), 4).shifted
    assert_losses_match(loss_of(rows.to(device)), rows)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n_rows", [2, 5])
def test_rows_may_lie_apart_and_start_anywhere(inputs: Inputs, device: torch.device, n_rows: int) -> None:
    width = 203
    rows = inputs.rows(n_rows, width, torch.bfloat16)
    for stride, start in ((width + 5, 0), (width, 3), (3 * width, 1), (256, 8), (width + 8, 0)):
        memory = torch.full((2, start + n_rows * stride), float("nan"), dtype=torch.bfloat16)
        z, r = (m.as_strided((n_rows, width), (stride, 1), m.storage_offset() + start) for m in memory)
        z.copy_(rows.logits), r.copy_(rows.reference)
        if device.type == "cuda":
            moved = memory.to(device)
            z, r = (m.as_strided((n_rows, width), (stride, 1), m.storage_offset() + start) for m in moved)
        assert_losses_match(loss_of(Rows(z, r, *rows.to(device)[2:])), rows)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_rows", [2, 4])
def test_identity_gives_exactly_zero_loss_and_gradient(
    inputs: Inputs, device: torch.device, n_rows: int, reverse: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = inputs.rows(n_rows, 139, dtype, scale=9.0).to(device)
        rows = rows._replace(reference=rows.logits.clone())
        for exclude in (True, False):
            results = loss_of(rows, margin=-1e6, exclude_answers=exclude, reverse=reverse, inverse_temperature=1.7)
            assert all((result == 0).all() for result in results[:4])


@pytest.mark.usefixtures("small_tiles")
def test_a_common_offset_of_a_row_changes_not_one_bit(inputs: Inputs, device: torch.device) -> None:
    rows = inputs.rows(3, 300)
    z, r = ((logits * 64).round() / 64 for logits in rows[:2])  # so that no digit is lost beside the offset
    rows = Rows(z, r, *rows[2:]).to(device)
    offset = torch.tensor([4096.0, -8192.0, 0.0], device=device)[:, None]
    moved = rows._replace(logits=rows.logits + offset, reference=rows.reference - 2 * offset)
    for here, there in zip(loss_of(rows), loss_of(moved), strict=True):
        assert torch.equal(here, there)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
def test_minus_infinity_counts_nothing_on_both_sides_and_is_infinite_on_one(
    inputs: Inputs, device: torch.device, reverse: bool
) -> None:
    n_rows, width = 4, 200
    rows = inputs.rows(n_rows, width, scale=2.0)
    rows = rows._replace(correct=torch.zeros(n_rows, dtype=torch.int64), wrong=torch.ones(n_rows, dtype=torch.int64))
    rows.logits[:, 2:150] = rows.reference[:, 2:150] = float("-inf")  # whole tiles of nothing, and a part of one
    weighting, other = (rows.logits, rows.reference) if reverse else (rows.reference, rows.logits)
    weighting[1, 160:] = float("-inf")  # no weight: the other side's logit may be anything
    other[2, 170] = float("-inf")  # weight on what is impossible
    got = loss_of(rows.to(device), reverse=reverse)
    exact = exact_loss(rows, torch.float64, reverse=reverse)
    assert torch.allclose(got[1].cpu().double(), exact[1], rtol=1e-5)
    assert got[1][2] == float("inf")
    assert (got[2][[0, 1, 3]][:, 2:150] == 0).all()
    assert got[2][[0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [-1, 130, 2**40, -(2**40)])
@pytest.mark.parametrize("n_rows", [3, 4])
def test_a_token_id_out_of_range_makes_its_row_nan_and_no_other(
    inputs: Inputs, device: torch.device, bad: int, n_rows: int
) -> None:
    rows = inputs.rows(n_rows, 130).to(device)
    good = loss_of(rows)
    for name in ("correct", "wrong"):
        ids = getattr(rows, name).clone()
        ids[1] = bad
        broken = loss_of(rows._replace(**{name: ids}))
        others = [n for n in range(n_rows) if n != 1]
        for before, after in zip(good[:4], broken[:4], strict=True):
            assert after[1].isnan().all()
            assert torch.equal(before[others], after[others])
        kernels.intervention_loss_scale_(
            broken[2], rows.direction, torch.ones_like(rows.direction), *rows._replace(**{name: ids})[2:4], broken[3]
        )
        assert broken[2][1].isnan().all()
        assert broken[2][others].isfinite().all()


def test_nothing_is_left_of_two_tokens_without_the_answers(inputs: Inputs, device: torch.device) -> None:
    rows = inputs.rows(3, 2).to(device)
    effectiveness, faithfulness, gradient, answer_grad, *_ = loss_of(rows, margin=100.0)
    assert (faithfulness == 0).all()
    assert (effectiveness > 0).all()
    assert torch.equal(gradient.gather(1, rows.correct[:, None])[:, 0], -rows.direction)
    assert torch.equal(gradient.gather(1, rows.wrong[:, None])[:, 0], rows.direction)
    assert torch.equal(answer_grad.cpu(), torch.stack([torch.zeros(3), torch.zeros(3), -rows.direction.cpu()], 1))


def test_no_rows_still_sum_the_scalars(inputs: Inputs, device: torch.device) -> None:
    scalars = inputs.normal(2, 3, 700).to(device)
    scalars[0, 0, :5] = 0
    rows = inputs.rows(2, 40).to(device)
    for some in (rows, Rows(*(value[:0] for value in rows))):
        *results, l1, sign = loss_of(some, scalars=scalars)
        assert l1.item() == pytest.approx(scalars.double().abs().sum().item(), rel=1e-6)
        assert torch.equal(sign, scalars.sign())
        assert results[2].shape == some.logits.shape
        assert results[3].shape == (len(some.logits), 3)
    l1, sign = loss_of(rows, scalars=scalars[:0])[4:]
    assert l1 == 0
    assert sign.shape == (0, 3, 700)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("n_rows", [3, 4])
def test_without_a_gradient_the_losses_are_the_same_and_nothing_else_is_made(
    inputs: Inputs, device: torch.device, n_rows: int
) -> None:
    rows, scalars = inputs.rows(n_rows, 257).to(device), inputs.normal(30).to(device)
    full, short = loss_of(rows, scalars), loss_of(rows, scalars, need_grad=False)
    assert all(torch.equal(full[i], short[i]) for i in (0, 1, 4))
    assert all(short[i].numel() == 0 for i in (2, 3, 5))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exclude", [True, False])
def test_the_saved_gradient_takes_any_upstream(
    inputs: Inputs, device: torch.device, dtype: torch.dtype, exclude: bool
) -> None:
    n_rows, width = 6, 143
    rows = inputs.rows(n_rows, width, dtype)
    d_e, d_f = inputs.normal(n_rows), inputs.normal(n_rows)
    d_e[0] = d_f[0] = d_f[1] = d_e[2] = 1.0
    d_f[3] = d_e[4] = 0.0
    on_device = rows.to(device)
    *_, saved, answer_grad, _, _ = loss_of(on_device, exclude_answers=exclude, margin=50.0)
    got = saved.clone()
    kernels.intervention_loss_scale_(
        got, d_e.to(device), d_f.to(device), on_device.correct, on_device.wrong, answer_grad
    )
    assert torch.equal(got[0], saved[0])
    options = {"exclude_answers": exclude, "margin": 50.0}
    exact = exact_loss(rows, torch.float64, (d_e, d_f), **options)[2]
    eager = exact_loss(rows, torch.float32, (d_e, d_f), **options)[2]
    ones = torch.ones(n_rows)
    condition = 4 * textbook_losses(rows, (d_e, d_f), torch.float64, **options).gradient_condition
    # Columns that are not answers are rounded twice, the saved gradient and then its multiple, each time by up to an
    # ulp (the interpreter cuts bfloat16 off), and the first ulp may be worth two of the second.
    once = exact_loss(rows, torch.float64, (ones, ones), **options)[2]
    twice = 2 * (once.abs() * torch.finfo(dtype).eps * d_f.abs()[:, None]).double() / torch.finfo(torch.float32).eps
    answers = torch.stack([rows.correct, rows.wrong], 1)
    assert_as_exact_as_eager("gradient", got, exact, eager, condition=condition + twice.scatter(1, answers, 0.0))


@pytest.mark.usefixtures("small_tiles")
def test_an_expanded_upstream_is_read_as_it_lies(inputs: Inputs, device: torch.device) -> None:
    rows = inputs.rows(5, 90).to(device)
    *_, saved, answer_grad, _, _ = loss_of(rows)
    upstream = torch.tensor(0.2, device=device)
    expanded, full = saved.clone(), saved.clone()
    for grad, d in ((expanded, upstream.expand(5)), (full, upstream.expand(5).contiguous())):
        kernels.intervention_loss_scale_(grad, d, d, rows.correct, rows.wrong, answer_grad)
    assert torch.equal(expanded, full)
    assert not torch.equal(expanded, saved)
    kernels.intervention_loss_scale_(saved, upstream.expand(5), upstream.expand(5), None, None, answer_grad)
    assert saved.isfinite().all()
