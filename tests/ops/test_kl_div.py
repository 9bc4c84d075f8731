"""kl_div_from_logits as trainers use it: soft-cap, ignored rows, weights, reductions; on every backend that runs here.

Temperature and direction alone are claims of `test_ops_loss`, odd layouts and sizes of `test_ops_loss_edges`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import assert_gradient
from op_cases import (
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
from actscale_fast.ops import registry

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in Triton's interpreter
]

CAPS = [None, 5.0]


def textbook(rows: Rows, upstream: Tensor, dtype: torch.dtype, softcap: float | None, **options: Any) -> Losses:
    """KL and its gradient by the raw logits, by the definitions, in `dtype`; in float32 this is eager PyTorch."""
    pair = torch.zeros_like(upstream), upstream
    raw = rows.to(torch.device("cpu"))
    if softcap is None:
        return textbook_losses(raw, pair, dtype, answers=False, **options)
    tanh = [torch.tanh(side.detach().to(dtype) / softcap) for side in raw[:2]]
    capped = raw._replace(logits=softcap * tanh[0], reference=softcap * tanh[1])
    losses = textbook_losses(capped, pair, dtype, answers=False, **options)
    return losses._replace(gradient=losses.gradient * (1 - tanh[0] ** 2))


def fused(rows: Rows, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    logits = rows.logits.detach().requires_grad_()
    divergence = ops.kl_div_from_logits(logits, rows.reference, **options)
    return divergence.detach(), torch.autograd.grad(divergence, logits, upstream)[0]


def check(backend: Backend, rows: Rows, upstream: Tensor, weight: Tensor, **options: Any) -> None:
    """w·KL and its gradient under `upstream` against float64, within twice the error of eager float32."""
    how = {name: value for name, value in options.items() if name in ("softcap", "temperature", "kl")}
    how.setdefault("softcap", None)
    got, gradient = fused(rows, upstream, row_weight=weight, **options)
    exact = textbook(rows, (upstream * weight).cpu(), torch.float64, **how)
    eager = textbook(rows, (upstream * weight).cpu(), torch.float32, **how)
    weight = weight.cpu()
    condition = backend.exp_error * exact.value_condition * weight.abs()
    assert_as_exact_as_eager(
        "kl", got, weight.double() * exact.faithfulness, weight * eager.faithfulness, condition=condition
    )
    if rows.logits.dtype == torch.float16:  # stored for a largest weight of 1, which is applied to it afterwards
        upstream = upstream * weight.abs().max()
    assert_gradient(gradient, exact, eager, (torch.zeros_like(upstream), upstream), backend)


@over(dtypes=DTYPES, shapes=[(4, 1), (6, 31)], native_shapes=[(4, 2), (2, 50257), (9, 2501)])
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_values_and_gradients_are_as_exact_as_eager_with_a_softcap_and_weights(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], kl: str, softcap: float | None, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype=dtype).to(backend.device)
    upstream, weight = (inputs.normal(shape[0]).to(backend.device) for _ in range(2))
    check(backend, rows, upstream, weight, softcap=softcap, kl=kl, temperature=1.7)


@over(dtypes=DTYPES, shapes=[(5, 33)], native_shapes=[(9, 2501)])
@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_ignored_rows_count_nothing_whatever_they_hold(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], kl: str, softcap: float | None, inputs: Inputs
) -> None:
    rows, n_rows = inputs.rows(*shape, dtype=dtype), shape[0]
    labels = torch.arange(n_rows)
    labels[::2] = -100
    ignored = labels == -100
    wild = rows._replace(logits=rows.logits.clone(), reference=rows.reference.clone())
    wild.logits[0], wild.reference[0], wild.logits[2, 3], wild.reference[4, 5] = (
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    upstream = inputs.normal(n_rows).to(backend.device)
    options: dict[str, Any] = {"labels": labels.to(backend.device), "softcap": softcap, "kl": kl}
    tame = fused(rows.to(backend.device), upstream, **options)
    for one, other in zip(fused(wild.to(backend.device), upstream, **options), tame, strict=True):
        assert torch.equal(one, other)
        assert not one[ignored].any()
        assert one[~ignored].any(-1).all()
    check(backend, rows.to(backend.device), upstream, (~ignored).float().to(backend.device), softcap=softcap, kl=kl)


@over(backends=["cpu", "triton", "cuda"])
def test_a_weight_of_zero_is_an_ignored_row_and_another_ignore_index_another_label(
    backend: Backend, inputs: Inputs
) -> None:
    rows = inputs.rows(6, 40).to(backend.device)
    rows.logits[1] = rows.reference[4] = torch.nan
    weight, labels = torch.ones(6), torch.full((6,), -100)
    weight[[1, 4]] = 0
    labels[[1, 4]] = 7
    upstream = inputs.normal(6).to(backend.device)
    by_weight = fused(rows, upstream, row_weight=weight.to(backend.device))
    by_label = fused(rows, upstream, labels=labels.to(backend.device), ignore_index=7)
    narrow = fused(rows, upstream, labels=labels.int().to(backend.device), ignore_index=7)
    for one, other, third in zip(by_weight, by_label, narrow, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@over(dtypes=[torch.float32, torch.float16])
def test_reductions_are_weighted_sums_and_means_over_the_rows_that_count(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    logits, reference = (inputs.normal(2, 5, 19, dtype=dtype).to(backend.device) for _ in range(2))
    labels = torch.tensor([[1, -100, 3, 4, -100], [-100, 7, 8, -100, 10]], device=backend.device)
    weight = inputs.normal(2, 5).abs().to(backend.device)
    kinds = ({}, {"labels": labels, "row_weight": weight}, {"labels": labels}, {"row_weight": weight})
    for given in kinds[:2] if backend.interpreted else kinds:
        w = given.get("row_weight", torch.ones(2, 5, device=backend.device))
        w = w.masked_fill(labels == -100, 0.0) if "labels" in given else w
        leaf = logits.detach().requires_grad_()
        per_row = ops.kl_div_from_logits(leaf, reference, **given)
        plain = ops.kl_div_from_logits(leaf, reference)
        assert per_row.shape == (2, 5)
        torch.testing.assert_close(per_row, w * plain, rtol=1e-5, atol=1e-7)
        for reduction, factor in (("sum", 1.0), ("mean", 1 / w.sum())):
            value = ops.kl_div_from_logits(leaf, reference, reduction=reduction, **given)  # type: ignore[arg-type]
            expected = (w * plain).sum() * factor
            assert value.shape == ()
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
            got, wanted = (torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in (value, expected))
            step = 2 * torch.finfo(dtype).eps  # both are rounded, one of them twice, or cut off
            torch.testing.assert_close(got, wanted, rtol=max(step, 1e-5), atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@over(dtypes=[torch.float32, torch.bfloat16], backends=["cpu", "triton", "cuda"])
def test_the_gradient_of_every_reduction_is_finished_in_the_forward_pass(
    backend: Backend, dtype: torch.dtype, reduction: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that scales it gets an upstream of 1 for every row, on which it leaves the gradient alone."""
    upstreams: list[Tensor] = []
    module = registry.module(backend.name)
    monkeypatch.setattr(module, "intervention_loss_scale_", lambda _grad, _e, f, *_: upstreams.append(f.clone()))
    rows = inputs.rows(6, 40, dtype=dtype).to(backend.device)
    labels, weight = torch.tensor([3, -100, 5, 6, -100, 8]).to(backend.device), inputs.normal(6).abs()
    given = ({}, {"labels": labels}, {"labels": labels, "row_weight": weight.to(backend.device)}, {"row_weight": 0.25})
    for options in given:
        fused(rows, torch.ones((), device=backend.device), reduction=reduction, **options)
    assert len(upstreams) == len(given)
    assert all(torch.equal(u, torch.ones_like(u)) for u in upstreams)


@over()
def test_the_mean_of_float16_keeps_gradients_that_a_loss_scale_is_to_save(backend: Backend, inputs: Inputs) -> None:
    """1/512 of a column's gradient of 2e-5 is nothing in float16; the loss scale that follows makes it large again."""
    n_rows = 512 if backend.name in ("reference", "cpu") or torch.cuda.is_available() else 16
    rows = inputs.rows(n_rows, 2000, dtype=torch.float16, scale=0.5).to(backend.device)
    for options in ({}, {"labels": torch.zeros(n_rows, dtype=torch.int64, device=backend.device)}):
        scale = torch.tensor(128.0 * n_rows, device=backend.device)
        _, gradient = fused(rows, scale, reduction="mean", **options)
        exact = textbook(rows, torch.full((n_rows,), 128.0), torch.float64, None).gradient
        assert (gradient.cpu().double() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@over()
def test_a_factor_in_the_weights_costs_float16_no_gradients(backend: Backend, as_tensor: bool, inputs: Inputs) -> None:
    """T²/n and a loss scale, as a trainer has them: of a gradient stored with T²/n in it 99 % would be 0."""
    n, temperature = 32768, 2.0
    factor = temperature**2 / n
    rows = inputs.rows(8, 2000, dtype=torch.float16, scale=0.5).to(backend.device)
    weight = torch.tensor(factor, device=backend.device) if as_tensor else factor
    exact = textbook(rows, torch.full((8,), factor * 65536), torch.float64, None, temperature=temperature).gradient
    upstream = torch.full((8,), 65536.0, device=backend.device)
    for reduction in ("none", "sum"):
        _, gradient = fused(
            rows, upstream if reduction == "none" else upstream[0], row_weight=weight, reduction=reduction,
            temperature=temperature,
        )  # fmt: skip
        assert (gradient.cpu().double() - exact).norm() <= 2e-3 * exact.norm()


@over()
def test_the_scale_of_the_weights_is_nothing_to_a_mean_in_float16(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(4, 50, dtype=torch.float16).to(backend.device)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0], device=backend.device)
    scale = torch.tensor(16.0, device=backend.device)
    value, gradient = fused(rows, scale, reduction="mean", row_weight=weight)
    for factor in (2.0**20, 2.0**-30, -(2.0**20)):
        others = fused(rows, scale, reduction="mean", row_weight=factor * weight)
        assert torch.equal(others[0], value)
        assert torch.equal(others[1], gradient)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@over(dtypes=[torch.float32, torch.float16])
def test_an_ignored_row_has_no_gradient_whatever_its_upstream_is(
    backend: Backend, dtype: torch.dtype, reduction: str, inputs: Inputs
) -> None:
    """The square root of a loss of 0 sends inf back."""
    rows = inputs.rows(4, 21, dtype=dtype).to(backend.device)
    labels = torch.tensor([3, -100, 5, -100], device=backend.device)
    logits = rows.logits.detach().requires_grad_()
    value = ops.kl_div_from_logits(logits, rows.reference, labels=labels, reduction="none")
    if reduction == "sum":
        (gradient,) = torch.autograd.grad(value.sum(), logits, torch.tensor(torch.nan, device=backend.device))
        assert gradient[[0, 2]].isnan().all()
    else:
        (gradient,) = torch.autograd.grad(value.sqrt().sum(), logits)
        assert gradient.isfinite().all()
        assert gradient[[0, 2]].any(-1).all()
    assert not gradient[[1, 3]].any()


@over(dtypes=[torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_mean_over_nothing_is_zero_and_so_is_its_gradient(
    backend: Backend, dtype: torch.dtype, reduction: str, inputs: Inputs
) -> None:
    rows = inputs.rows(4, 21, dtype=dtype).to(backend.device)
    one = torch.ones((), device=backend.device)
    none = Rows(*(value[:0] for value in rows))
    cancelling = torch.tensor([1.0, -1.0, 2.0, -2.0], device=backend.device)
    for some, options in (
        (rows, {"labels": torch.full((4,), -100, device=backend.device)}),
        (rows, {"row_weight": 0.0}),
        (rows, {"row_weight": cancelling}),
        (none, {}),
        (none, {"labels": torch.zeros(0, dtype=torch.int64, device=backend.device)}),
    ):
        value, gradient = fused(some, one, reduction=reduction, **options)
        assert value == 0
        assert gradient.shape == some.logits.shape
        assert not gradient.any()


@over(dtypes=DTYPES, shapes=[(3, 29)], native_shapes=[(2, 50257)])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_equal_logits_give_exactly_zero_under_a_softcap(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int], kl: str, inputs: Inputs
) -> None:
    rows = inputs.rows(*shape, dtype=dtype, scale=20.0)
    rows = rows._replace(reference=rows.logits.clone()).to(backend.device)
    upstream, weight = (inputs.normal(shape[0]).to(backend.device) for _ in range(2))
    value, gradient = fused(rows, upstream, row_weight=weight, softcap=15.0, temperature=0.7, kl=kl)
    assert not value.any()
    if backend.name == "reference":  # autograd of log_softmax leaves p·(Σp − 1): Σp is 1 within an ulp an element
        assert gradient.abs().max() <= 32 * torch.finfo(torch.float32).eps * (upstream * weight).abs().max()
    else:
        assert not gradient.any()


@over()
def test_a_row_shift_changes_nothing_unless_there_is_a_softcap(backend: Backend, inputs: Inputs) -> None:
    z, r = ((inputs.normal(4, 131, scale=3.0) * 64).round().div(64).to(backend.device) for _ in range(2))
    weight = inputs.normal(4).to(backend.device)
    for softcap in (None, 30.0):
        still = ops.kl_div_from_logits(z, r, row_weight=weight, softcap=softcap)
        moved = ops.kl_div_from_logits(z + 16, r - 32, row_weight=weight, softcap=softcap)
        assert torch.equal(still, moved) is (softcap is None)


@over(dtypes=DTYPES)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_impossible_tokens_stay_so_without_a_softcap_and_are_minus_the_cap_with_one(
    backend: Backend, dtype: torch.dtype, kl: str, inputs: Inputs
) -> None:
    bare = inputs.rows(3, 70, dtype=dtype)
    padding = torch.full((3, 60), -torch.inf, dtype=dtype)
    padded = bare._replace(**{side: torch.cat([getattr(bare, side), padding], 1) for side in ("logits", "reference")})
    upstream, weight = (inputs.normal(3).to(backend.device) for _ in range(2))
    check(backend, padded.to(backend.device), upstream, weight, kl=kl)
    _, gradient = fused(padded.to(backend.device), upstream, row_weight=weight, kl=kl)
    assert not gradient[:, 70:].any()
    low = padded._replace(
        **{side: getattr(padded, side).nan_to_num(neginf=-1e3) for side in ("logits", "reference")}
    )  # as good as −inf to a cap of 4
    values = [fused(some.to(backend.device), upstream, row_weight=weight, kl=kl, softcap=4.0) for some in (padded, low)]
    assert torch.equal(values[0][0], values[1][0])
    assert (values[0][1][:, 70:].abs() <= 1e-18).all()
    check(backend, low.to(backend.device), upstream, weight, kl=kl, softcap=4.0)


@over(backends=["cpu", "triton", "cuda"])
def test_the_slope_of_the_cap_keeps_its_digits_where_it_flattens_out(backend: Backend, inputs: Inputs) -> None:
    """Eager PyTorch's 1 − tanh² is a difference of ones there: at 7 caps it is off by a twentieth, at 10 it is 0."""
    rows = inputs.rows(2, 24, scale=1.0)
    rows.logits[:, :6] = torch.tensor([7.0, 8.0, 10.0, -7.0, -8.0, 15.0]) * 2
    upstream = torch.ones(2, device=backend.device)
    for kl in ("forward", "reverse"):
        _, gradient = fused(rows.to(backend.device), upstream, softcap=2.0, kl=kl)
        capped = rows._replace(
            logits=2 * torch.tanh(rows.logits.double() / 2), reference=2 * torch.tanh(rows.reference.double() / 2)
        )
        exact = textbook(capped, torch.ones(2), torch.float64, None, kl=kl)
        slope = 1 / torch.cosh(rows.logits.double() / 2) ** 2
        torch.testing.assert_close(gradient.cpu().double(), exact.gradient * slope, rtol=2e-5, atol=2e-8)
        steep = slope < 1e-4
        torch.testing.assert_close(gradient.cpu().double()[steep], (exact.gradient * slope)[steep], rtol=1e-4, atol=0)


@over(dtypes=DTYPES)
def test_rows_may_lie_apart_and_weights_broadcast(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    rows = inputs.rows(6, 61, dtype=dtype).to(backend.device)
    wide = torch.full((6, 67), torch.nan, dtype=dtype, device=backend.device)
    wide[:, 3:64] = rows.reference
    apart = torch.full((6, 3, 61), torch.nan, dtype=dtype, device=backend.device)
    apart[:, 1] = rows.logits
    upstream, per_sequence = inputs.normal(6).to(backend.device), inputs.normal(2, 1).to(backend.device)
    weight = per_sequence.expand(2, 3).reshape(6)
    check(backend, rows._replace(logits=apart[:, 1], reference=wide[:, 3:64]), upstream, weight, softcap=6.0)
    cube = rows.logits.reshape(2, 3, 61), rows.reference.reshape(2, 3, 61)
    expected = ops.kl_div_from_logits(*rows[:2], row_weight=weight)
    assert torch.equal(ops.kl_div_from_logits(*cube, row_weight=per_sequence), expected.reshape(2, 3))
    mask = torch.tensor([[True, False, True]], device=backend.device)
    expected = ops.kl_div_from_logits(*rows[:2], row_weight=mask.float().expand(2, 3).reshape(6))
    assert torch.equal(ops.kl_div_from_logits(*cube, row_weight=mask), expected.reshape(2, 3))
    half = torch.tensor(0.5)
    by_number = ops.kl_div_from_logits(*rows[:2], row_weight=0.5)
    assert torch.equal(ops.kl_div_from_logits(*rows[:2], row_weight=half.to(backend.device)), by_number)


@over()
def test_the_directions_are_the_two_ends_of_the_generalized_divergence_of_gkd(backend: Backend, inputs: Inputs) -> None:
    """arXiv 2306.13649, as trainers write it: beta = 0 is KL(teacher ‖ student), beta = 1 KL(student ‖ teacher)."""
    student, teacher = (inputs.normal(2, 4, 23, scale=2.0).to(backend.device) for _ in range(2))
    labels = torch.tensor([[1, 2, -100, -100], [-100, 2, 3, 4]], device=backend.device)
    log_q, log_p = ((side / 0.9).log_softmax(-1) for side in (student, teacher))
    for kl, written in (("forward", (log_q, log_p)), ("reverse", (log_p, log_q))):
        terms = F.kl_div(*written, reduction="none", log_target=True)[labels != -100]
        expected = terms.sum() / (labels != -100).sum()
        got = ops.kl_div_from_logits(
            student, teacher, temperature=0.9, labels=labels, kl=kl, reduction="batchmean"  # type: ignore[arg-type]
        )  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@over(dtypes=DTYPES, backends=["cpu", "triton", "cuda"])
@pytest.mark.parametrize("softcap", CAPS)
def test_a_gradient_in_place_is_the_same_gradient_in_the_logits_memory(
    backend: Backend, dtype: torch.dtype, softcap: float | None, inputs: Inputs
) -> None:
    rows = inputs.rows(6, 2501, dtype).to(backend.device)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]], device=backend.device)
    results = []
    for inplace in (False, True):
        leaf = rows.logits.reshape(2, 3, 2501).clone().requires_grad_()
        logits = leaf * 1  # as a head gives them: no leaf
        value = ops.kl_div_from_logits(
            logits, rows.reference.reshape(2, 3, 2501), labels=labels, softcap=softcap, reduction="mean",
            inplace_gradient=inplace,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient.data_ptr() == logits.data_ptr()) is inplace
        results.append((value.detach(), gradient.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_reference_passes_gradcheck_in_float64(kl: Any, reduction: Any, inputs: Inputs) -> None:
    rows, weight = inputs.rows(4, 7, dtype=torch.float64, scale=1.0), inputs.normal(4, dtype=torch.float64)
    labels = torch.tensor([1, 2, -100, 3])
    rows.reference[2] = torch.nan

    def divergence(logits: Tensor) -> Tensor:
        return ops.kl_div_from_logits(
            logits, rows.reference, temperature=1.3, softcap=2.0, kl=kl, reduction=reduction, labels=labels,
            row_weight=weight,
        )  # fmt: skip

    leaf = rows.logits.requires_grad_()
    assert divergence(leaf).dtype == torch.float64
    assert torch.autograd.gradcheck(divergence, (leaf,))
    assert torch.autograd.gradgradcheck(divergence, (leaf,))


@over()
def test_the_inputs_are_not_written_to(backend: Backend, inputs: Inputs) -> None:
    rows = inputs.rows(3, 31).to(backend.device)
    labels, weight = torch.tensor([1, -100, 2], device=backend.device), inputs.normal(3).to(backend.device)
    given = (*rows[:2], labels, weight)
    before = [value.clone() for value in given]
    upstream = torch.tensor(0.3, device=backend.device)
    fused(rows, upstream, labels=labels, row_weight=weight, reduction="mean", softcap=9.0)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@over()
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend, inputs: Inputs) -> None:
    z = inputs.normal(2, 3, 5).to(backend.device)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=backend.device)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a positive number"),
        ({"softcap": float("inf")}, ValueError, "softcap: got inf, expected a positive number that float32 holds"),
        ({"softcap": 1e39}, ValueError, "softcap: got 1e+39, expected a positive number that float32 holds"),
        (
            {"temperature": float("inf")}, ValueError,
            "temperature: got inf, expected a positive number that float32 holds",
        ),
        ({"temperature": 1e-40}, ValueError, "temperature: got 1e-40, expected a positive number that float32 holds"),
        (
            {"temperature": 2e38}, ValueError,
            "1 / temperature: got 5e-39, expected a positive number that float32 holds",
        ),
        ({"softcap": "30"}, TypeError, "softcap: got str, expected a number"),
        ({"labels": [1]}, TypeError, "labels: got list, expected an int64 tensor [2, 3]"),
        ({"labels": ids.float()}, TypeError, "labels: got dtype torch.float32, expected int64"),
        ({"labels": ids[0]}, ValueError, "labels: got shape (3,), expected (2, 3)"),
        ({"labels": ids.to("meta")}, ValueError, f"labels: got a tensor on meta, expected one on {backend.device}"),
        ({"labels": ids, "ignore_index": -100.0}, TypeError, "ignore_index: got float, expected an int"),
        ({"row_weight": "1"}, TypeError, "row_weight: got str, expected a number"),
        (
            {"row_weight": ids[:, :2]}, ValueError,
            "row_weight: got shape (2, 2), expected one that broadcasts to (2, 3)",
        ),
        (
            {"row_weight": ids[None]}, ValueError,
            "row_weight: got shape (1, 2, 3), expected one that broadcasts to (2, 3)",
        ),
        ({"row_weight": ids.to("meta")}, ValueError, f"row_weight: got a tensor on meta, expected one on {z.device}"),
        (
            {"row_weight": torch.ones(3, requires_grad=True)}, ValueError,
            "row_weight: requires a gradient, but it is not differentiated",
        ),
        (
            {"row_weight": ids.to(torch.complex64)}, TypeError,
            "row_weight: got dtype torch.complex64, expected real numbers",
        ),
    ]  # fmt: skip
    for options, kind, message in cases:
        assert error_of(lambda o=options: ops.kl_div_from_logits(z, z, **o), kind) == message
    leaf = z.clone().requires_grad_()
    message = error_of(lambda: ops.kl_div_from_logits(leaf, z, inplace_gradient=True), ValueError)
    assert message.startswith("inplace_gradient: got logits that are a leaf")
