"""The Triton kernels against the float64 formulas, called as the registry calls them.

Without a GPU they run in Triton's interpreter; with one, the same claims are checked on real tensors, and so are CUDA
graphs and tensors of more than 2³¹ elements.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DTYPES, Inputs, Rows, assert_as_exact_as_eager, textbook_losses
from torch import Tensor

from actscale_fast.ops import backends, reference

pytest.importorskip("triton", reason="Triton is not installed")

from actscale_fast.ops import triton as kernels
from actscale_fast.ops.triton import columns, loss, rescale
from actscale_fast.ops.triton.scale_heads import TILE, Geometry

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in the interpreter
]


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available() and not backends.triton_interpreted():
        return torch.device("cuda")
    if not backends.triton_interpreted():
        pytest.skip("no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")
    return torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In the interpreter, tiles of 64 columns instead of 2048 and one multiprocessor: short rows have many tiles, up to
    three rows are split over programs, and four fill the chip."""
    if device.type == "cpu":
        monkeypatch.setattr(columns, "THREADS_PER_WARP", 1)
        for module in (loss, rescale):
            monkeypatch.setattr(module, "processors", lambda device: 1)


def loss_of(rows: Rows, scalars: Tensor | None = None, need_grad: bool = True, **options: Any) -> tuple[Tensor, ...]:
    answers = options.pop("answers", True)
    return kernels.intervention_loss(
        rows.logits,
        rows.reference,
        *((rows.correct, rows.wrong, rows.direction) if answers else (None, None, None)),
        scalars,
        options.get("margin", 1.0),
        options.get("inverse_temperature", 1.0),
        options.get("exclude_answers", True),
        options.get("reverse", False),
        need_grad,
    )


def exact_loss(
    rows: Rows, dtype: torch.dtype, upstream: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, gradient) of `reference`, computed in `dtype` on the CPU."""
    cpu = rows.to(torch.device("cpu"))
    answers = (cpu.correct, cpu.wrong, cpu.direction) if options.pop("answers", True) else (None, None, None)
    z = cpu.logits.to(dtype).requires_grad_()
    e, f = reference.intervention_loss(z, cpu.reference.to(dtype), *answers, **options)
    d_e, d_f = (torch.ones_like(e), torch.ones_like(f)) if upstream is None else (u.cpu().to(dtype) for u in upstream)
    (gradient,) = torch.autograd.grad((e * d_e + f * d_f).sum(), z)
    return e.detach(), f.detach(), gradient


def assert_losses_match(got: tuple[Tensor, ...], rows: Rows, **options: Any) -> None:
    exact, eager = exact_loss(rows, torch.float64, **options), exact_loss(rows, torch.float32, **options)
    ones = torch.ones(len(rows.logits))
    condition = textbook_losses(
        rows, (ones, ones), torch.float64, exclude_answers=options.get("exclude_answers", True),
        kl="reverse" if options.get("reverse") else "forward", temperature=1 / options.get("inverse_temperature", 1.0),
        answers=options.get("answers", True),
    )  # fmt: skip
    assert_as_exact_as_eager("effectiveness", got[0], exact[0], eager[0], condition=rows.logits.abs().max().double())
    # 1: the sums of exponentials, whose ratio's logarithm is a term, are at least 1 and float32
    assert_as_exact_as_eager("faithfulness", got[1], exact[1], eager[1], condition=4 * condition.value_condition)
    assert_as_exact_as_eager("gradient", got[2], exact[2], eager[2], condition=4 * condition.gradient_condition)


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


SCALES = {
    "one_scalar_a_head": ((2, 7, 3, 8), 1, False, (True, False)),
    "positions_and_groups": ((3, 5, 4, 16), 2, True, (True, True)),
    "shift_alone": ((2, 6, 2, 5), 1, False, (False, True)),
    "row_by_row": ((3, 4, 2, 80), 3, False, (True, True)),
    "one_wide_site": ((2, 3, 1, 2100), 1, False, (True, True)),
    "many_heads": ((1, 2, 70, 64), 1, False, (True, False)),
    "one_channel": ((2, 5, 3, 1), 2, False, (True, True)),
    "one_token": ((4, 1, 5, 12), 2, False, (True, True)),
    "many_positions": ((2, 40, 2, 3), 2, False, (True, True)),
}


def scale_case(inputs: Inputs, name: str, dtype: torch.dtype) -> dict[str, Any]:
    (B, T, H, D), G, by_position, (has_alpha, has_shift) = SCALES[name]
    P = T if by_position else 1
    group = inputs.integers(G, B) if G > 1 and name != "row_by_row" else None
    return {
        "x": inputs.normal(B, T, H, D, dtype=dtype),
        "alpha": inputs.normal(G, P, H) if has_alpha else None,
        "shift": inputs.normal(G, P, H, D) if has_shift else None,
        "strength": -1.5,
        "row_strength": inputs.normal(B) if name != "shift_alone" else None,
        "group": group,
    }


def scale_and_gradients(case: dict[str, Any], dy: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """[y, dx, dalpha, dshift] of `reference`, computed in `dtype` on the CPU."""
    leaves = {k: case[k].to(dtype).requires_grad_() for k in ("x", "alpha", "shift") if case[k] is not None}
    rest = {k: case[k] for k in case if k not in leaves}
    y = reference.scale_heads(**leaves, **rest)
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))
    return [y.detach(), *(gradients.get(k) for k in ("x", "alpha", "shift"))]


def moved(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.items()}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_and_its_gradients_match_the_formulas(
    inputs: Inputs, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    case = scale_case(inputs, name, dtype)
    dy = inputs.normal(*case["x"].shape, dtype=dtype)
    here = moved(case, device)
    y = kernels.scale_heads(**here)
    needs = (True, case["alpha"] is not None, case["shift"] is not None)
    got = [y, *kernels.scale_heads_backward(dy.to(device), **here, **dict(zip(NEEDS, needs, strict=True)))]
    exact, eager = scale_and_gradients(case, dy, torch.float64), scale_and_gradients(case, dy, torch.float32)
    size = scale_and_gradients(
        {k: v.abs() if k in ("x", "alpha", "shift", "row_strength") and v is not None else v for k, v in case.items()}
        | {"strength": abs(case["strength"])}, dy.abs(), torch.float64,
    )  # fmt: skip
    for label, value, right, plain, condition in zip(
        ("y", "dx", "dalpha", "dshift"), got, exact, eager, size, strict=True
    ):
        if right is not None:
            assert plain is not None
            assert condition is not None
            # 4: a sum of a few hundred terms in another order than eager's, which may have been lucky
            assert_as_exact_as_eager(label, value, right, plain, condition=4 * condition)
    for need in [(True, False, False), (False, *needs[1:]), (False, needs[1], False)]:
        again = kernels.scale_heads_backward(dy.to(device), **here, **dict(zip(NEEDS, need, strict=True)))
        for value, full, wanted in zip(again, got[1:], need, strict=True):
            assert torch.equal(value, full) if wanted else value.numel() == 0


NEEDS = ("need_dx", "need_dalpha", "need_dshift")


def test_any_layout_of_rows_tokens_and_heads_gives_the_same_bits(inputs: Inputs, device: torch.device) -> None:
    case = moved(scale_case(inputs, "positions_and_groups", torch.float32), device)
    dy = inputs.normal(*case["x"].shape).to(device)
    x = case["x"]
    plain = [kernels.scale_heads(**case), *kernels.scale_heads_backward(dy, **case, **dict.fromkeys(NEEDS, True))]
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = torch.full((*x.shape[:3], x.shape[3] + 3), float("nan"), device=device)[..., 1 : x.shape[3] + 1].copy_(x)
    for other in (heads_first, gaps, x.flip(0).clone().flip(0)):
        again = {**case, "x": other}
        y = kernels.scale_heads(**again)
        dx, dalpha, dshift = kernels.scale_heads_backward(dy, **again, **dict.fromkeys(NEEDS, True))
        assert y.stride() == torch.empty_like(other).stride() == dx.stride()
        assert all(torch.equal(a, b) for a, b in zip(plain, (y, dx, dalpha, dshift), strict=True))


def test_an_expanded_gradient_is_read_as_it_lies(inputs: Inputs, device: torch.device) -> None:
    case = moved(scale_case(inputs, "one_scalar_a_head", torch.float32), device)
    expanded = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0, 3.0, 1.5, 0.25]], device=device).expand(case["x"].shape)
    needs = {"need_dx": True, "need_dalpha": True, "need_dshift": False}
    assert expanded.stride()[:3] == (0, 0, 0)
    for a, b in zip(
        kernels.scale_heads_backward(expanded, **case, **needs),
        kernels.scale_heads_backward(expanded.contiguous(), **case, **needs),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-1, 2, 2**40, -(2**40)])
@pytest.mark.parametrize("has", [(True, True), (True, False), (False, True)])
def test_a_group_out_of_range_makes_its_row_nan_and_no_other(
    inputs: Inputs, device: torch.device, bad: int, has: tuple[bool, bool]
) -> None:
    case = moved(scale_case(inputs, "positions_and_groups", torch.float32), device)
    case |= {name: case[name] if there else None for name, there in zip(("alpha", "shift"), has, strict=True)}
    dy = torch.ones_like(case["x"])
    needs = {"need_dx": True, "need_dalpha": has[0], "need_dshift": has[1]}
    y, dx = kernels.scale_heads(**case), kernels.scale_heads_backward(dy, **case, **needs)[0]
    case["group"] = case["group"].clone()
    case["group"][1] = bad
    bad_y, (bad_dx, *sums) = kernels.scale_heads(**case), kernels.scale_heads_backward(dy, **case, **needs)
    assert bad_y[1].isnan().all()
    assert bad_dx[1].isnan().all()
    assert torch.equal(bad_y[[0, 2]], y[[0, 2]])
    assert torch.equal(bad_dx[[0, 2]], dx[[0, 2]])
    assert all(total.isfinite().all() for total in sums)


def test_an_empty_batch_has_zero_sums(inputs: Inputs, device: torch.device) -> None:
    alpha, shift = inputs.normal(2, 1, 3).to(device), inputs.normal(2, 1, 3, 4).to(device)
    x = torch.empty(0, 5, 3, 4, device=device)
    group = torch.empty(0, dtype=torch.int64, device=device)
    assert kernels.scale_heads(x, alpha, shift, 1.0, None, group).shape == x.shape
    _, dalpha, dshift = kernels.scale_heads_backward(x, x, alpha, shift, 1.0, None, group, True, True, True)
    assert (dalpha == 0).all()
    assert dalpha.shape == alpha.shape
    assert (dshift == 0).all()
    assert dshift.shape == shift.shape


@pytest.mark.parametrize("size", [1, 5, 1500, 2500], ids=["one", "few", "blocks", "programs"])
def test_the_optimiser_steps_like_the_formulas(
    inputs: Inputs, device: torch.device, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actscale_fast.ops.triton.proximal.ONE_PROGRAM", 2048)
    options = {"lr": 0.03, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "l1": 0.6}
    start = inputs.normal(size, scale=0.1)
    runs = {}
    for dtype in (torch.float64, torch.float32):
        state = [t.to(dtype) for t in (start.clone(), torch.zeros(size), torch.zeros(size), torch.tensor(0.0))]
        runs[dtype] = state
    got = [t.to(device) for t in (start.clone(), torch.zeros(size), torch.zeros(size), torch.tensor(0.0))]
    for _ in range(4):
        gradient, before = inputs.normal(size), runs[torch.float64][0].clone()
        for dtype, (p, m, v, step) in runs.items():
            reference.proximal_adam_(p, gradient.to(dtype), m, v, step, **options)
        p, m, v, step = got
        kernels.proximal_adam_(p, gradient.to(device), m, v, step, *options.values())
    assert got[3].item() == 4
    names = ("parameter", "exp_avg", "exp_avg_sq")
    for name, value, exact, eager in zip(names, got, runs[torch.float64], runs[torch.float32], strict=False):
        assert_as_exact_as_eager(name, value, exact, eager, condition=4 * (exact.abs() + 0.2))
    if size > 5:
        exact, first, second, _ = runs[torch.float64]
        zeros = exact == 0
        assert 0 < zeros.sum() < size
        rate = options["lr"] / ((second / (1 - options["beta2"] ** 4)).sqrt() + options["eps"])
        moved = before - rate * first / (1 - options["beta1"] ** 4)
        clear = (moved.abs() - rate * options["l1"]).abs() > 1e-6  # float32 may fall on either side of the threshold
        assert clear.sum() > 0.9 * size
        assert torch.equal((got[0].cpu() == 0)[clear], zeros[clear])


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.0), (0.9, 0.999), (0.5, 0.99999)])
def test_the_first_step_is_as_long_as_the_rate(device: torch.device, beta1: float, beta2: float) -> None:
    p, m, v = (torch.zeros(3, device=device) for _ in range(3))
    gradient = torch.tensor([2.0, -1e-3, math.nan], device=device)
    kernels.proximal_adam_(p, gradient, m, v, torch.zeros((), device=device), 0.1, beta1, beta2, 0.0, 0.0)
    assert p[:2].tolist() == pytest.approx([-0.1, 0.1], rel=1e-6)
    assert p[2].isnan()


def everything(inputs: Inputs, device: torch.device, n_rows: int = 3, width: int = 203) -> Any:
    """A call that runs all five functions once and returns their results."""
    rows = inputs.rows(n_rows, width, torch.bfloat16).to(device)
    case = moved(scale_case(inputs, "positions_and_groups", torch.bfloat16), device)
    dy, scalars = torch.ones_like(case["x"]), inputs.normal(40).to(device)
    d_e, d_f = inputs.normal(n_rows).to(device), inputs.normal(n_rows).to(device)
    zero = torch.zeros_like(scalars)

    def call() -> list[Tensor]:
        losses = loss_of(rows, scalars)
        kernels.intervention_loss_scale_(losses[2], d_e, d_f, rows.correct, rows.wrong, losses[3])
        state = [scalars.clone(), zero.clone(), zero.clone(), torch.zeros((), device=device)]
        kernels.proximal_adam_(state[0], losses[5], *state[1:], 0.1, 0.9, 0.999, 1e-8, 0.1)
        scaled = kernels.scale_heads_backward(dy, **case, **dict.fromkeys(NEEDS, True))
        return [*losses, *state, kernels.scale_heads(**case), *scaled]

    return call


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(inputs: Inputs, device: torch.device) -> None:
    call = everything(inputs, device)
    assert all(torch.equal(first, second) for first, second in zip(call(), call(), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 64, 130, 600, 9000])
@pytest.mark.parametrize("width", [0, 1, 31, 2047, 50257, 262144, 3_000_000])
def test_the_tiles_of_a_row_cover_it_and_no_program_is_idle(rows: int, width: int) -> None:
    for dtype in DTYPES:
        tiling = columns.Tiling.of(rows, width, dtype, (width, width), 132)
        tile = tiling.unroll * tiling.lanes * tiling.vector
        needed = width + (tiling.vector - 1 if tiling.shifted else 0)
        assert tiling.splits * tiling.tiles * tile >= needed
        assert (tiling.splits - 1) * tiling.tiles * tile < max(needed, 1)
        assert 1 <= tiling.splits <= columns.MAX_SPLITS.value


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (32, 512, 32, 128), (3, 1000, 12, 64), (2, 4096, 1, 16384), (1, 1, 7, 3)]
)
def test_the_tiles_of_an_activation_cover_it(shape: tuple[int, int, int, int]) -> None:
    _, T, H, D = shape
    geometry = Geometry.of(*shape, 132)
    assert geometry.heads * geometry.channels <= TILE
    assert geometry.head_tiles * geometry.heads >= H
    assert geometry.channel_tiles * geometry.channels >= D
    assert (geometry.chunks - 1) * geometry.steps < T <= geometry.chunks * geometry.steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    device = torch.device("cuda")

    def test_a_cuda_graph_captures_every_kernel_and_replays_the_same_bits(self, inputs: Inputs) -> None:
        call = everything(inputs, self.device, 8, 50257)
        expected = call()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(2):
            for result in captured:
                result.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    @pytest.mark.parametrize("shape", [(8, 50257), (64, 128256), (700, 32000)])
    def test_real_sizes_match_the_formulas(self, inputs: Inputs, shape: tuple[int, int]) -> None:
        rows = inputs.rows(*shape, torch.bfloat16).to(self.device)
        got = loss_of(rows)
        z = rows.logits.double().requires_grad_()
        e, f = reference.intervention_loss(z, rows.reference.double(), *rows[2:4], rows.direction.double())
        (gradient,) = torch.autograd.grad((e + f).sum(), z)
        assert torch.allclose(got[0].double(), e, atol=1e-5)
        assert torch.allclose(got[1].double(), f, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got[2].double(), gradient, rtol=2**-8, atol=1e-9)
        same = loss_of(rows._replace(reference=rows.logits.clone()), margin=-1e6)
        assert all((result == 0).all() for result in same[:4])

    @pytest.mark.large
    def test_more_than_two_to_the_31_logits(self, inputs: Inputs) -> None:
        n_rows, width = 17000, 131072
        z = torch.empty(n_rows, width, dtype=torch.bfloat16, device=self.device).normal_()
        r = torch.empty_like(z).normal_()
        last = slice(n_rows - 3, n_rows)
        ids = torch.arange(n_rows, device=self.device)
        sign = torch.ones(n_rows, device=self.device)
        got = loss_of(Rows(z, r, ids, ids + 1, sign))
        tail = Rows(z[last], r[last], ids[last], ids[last] + 1, sign[last])
        e, f = reference.intervention_loss(
            tail.logits.double(), tail.reference.double(), tail.correct, tail.wrong, tail.direction.double()
        )
        assert torch.allclose(got[0][last].double(), e, atol=1e-5)
        assert torch.allclose(got[1][last].double(), f, rtol=1e-5)
        assert torch.allclose(got[2][last].float(), loss_of(tail)[2].float(), rtol=2**-7, atol=1e-9)

    @pytest.mark.large
    def test_more_than_two_to_the_31_activations(self) -> None:
        x = torch.empty(3, 6000, 32, 4096, dtype=torch.bfloat16, device=self.device).normal_()
        alpha = torch.randn(1, 1, 32, device=self.device)
        y = kernels.scale_heads(x, alpha, None, 1.0, None, None)
        assert torch.equal(y[2, -2:], reference.scale_heads(x[2:, -2:], alpha, None, 1.0, None, None)[0])
        dx, dalpha, _ = kernels.scale_heads_backward(x, x, alpha, None, 1.0, None, None, True, True, False)
        assert torch.equal(dx[2, -2:], y[2, -2:])
        exact = torch.stack([part.double().square().sum((0, 2)) for part in x.flatten(0, 1).split(500)]).sum(0)
        assert torch.allclose(dalpha.flatten().double(), exact, rtol=1e-5)
