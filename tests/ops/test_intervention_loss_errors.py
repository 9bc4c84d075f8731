"""What the losses refuse, word for word, and what ids out of range do where nothing may be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import fused
from op_cases import (
    BACKENDS,
    Backend,
    Inputs,
    Rows,
    error_of,
    over,
)
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import reference as formulas

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@over(backends=["triton", "cuda"])
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


@over(backends=["cpu", "triton", "cuda"])  # plain PyTorch keeps its own copy of the ids
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
