"""What the losses from hidden states refuse, word for word, and what an id out of range does where none is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import Head, head, run
from op_cases import DTYPES, Backend, Inputs, error_of, over
from torch import Tensor

from actscale_fast import ops
from actscale_fast.ops import checks
from actscale_fast.ops.losses import linear_intervention_loss, linear_softmax

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Cases = list[tuple[dict[str, Any], type[Exception], str]]


def statistics_with(h: Head, **changes: Any) -> Callable[[], object]:
    given = {"hidden": h.frozen, "weight": h.weight, "correct": h.correct, "wrong": h.wrong, **h.of_head, **changes}
    return lambda: ops.reference_statistics(**given)


def loss_with(h: Head, reference: object, **changes: Any) -> Callable[[], object]:
    given = {
        "hidden": h.steered, "weight": h.weight, "reference": reference, "correct": h.correct, "wrong": h.wrong,
        "direction": h.direction, **h.of_head, **changes,
    }  # fmt: skip
    return lambda: ops.linear_intervention_loss(**given)


@over()
def test_errors_of_both_functions_name_the_argument_what_came_and_what_was_expected(
    backend: Backend, inputs: Inputs
) -> None:
    h = head(inputs, (3, 31, 8), bias=True).to(backend.device)
    assert h.bias is not None
    reference, ids = ops.reference_statistics(h.frozen, h.weight, *h.answers, bias=h.bias), h.correct
    here = h.weight.device
    cases: Cases = [
        ({"hidden": [1.0]}, TypeError, "hidden: got list, expected a floating-point tensor [N, d]"),
        ({"hidden": ids}, TypeError, "hidden: got dtype torch.int64, expected a floating-point tensor [N, d]"),
        ({"hidden": h.steered[0]}, ValueError, "hidden: got shape (8,), expected [N, d]"),
        ({"hidden": h.steered[:, :0]}, ValueError, "hidden: got shape (3, 0), expected [N, d]"),
        ({"weight": None}, TypeError, "weight: got NoneType, expected a floating-point tensor [V, d]"),
        ({"weight": h.weight[:, 1:]}, ValueError, "weight: got shape (31, 7), expected [V, 8]"),
        ({"weight": h.weight[:0]}, ValueError, "weight: got shape (0, 8), expected [V, 8]"),
        ({"weight": h.weight[None]}, ValueError, "weight: got shape (1, 31, 8), expected [V, 8]"),
        (
            {"weight": h.weight.bfloat16()}, TypeError,
            "weight: got dtype torch.bfloat16, expected torch.float32 as hidden has",
        ),
        ({"weight": h.weight.to("meta")}, ValueError, f"weight: got a tensor on meta, expected one on {here}"),
        ({"bias": 1.0}, TypeError, "bias: got float, expected a floating-point tensor [V]"),
        ({"bias": h.bias.long()}, TypeError, "bias: got dtype torch.int64, expected a floating-point tensor [V]"),
        ({"bias": h.bias[1:]}, ValueError, "bias: got shape (30,), expected (31,)"),
        ({"bias": h.bias.to("meta")}, ValueError, f"bias: got a tensor on meta, expected one on {here}"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a positive number"),
        ({"softcap": 1e39}, ValueError, "softcap: got 1e+39, expected a positive number that float32 holds"),
        ({"softcap": "30"}, TypeError, "softcap: got str, expected a number"),
        (
            {"logit_scale": float("inf")}, ValueError,
            "logit_scale: got inf, expected a positive number that float32 holds",
        ),
        ({"logit_scale": -1.0}, ValueError, "logit_scale: got -1.0, expected a positive number"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale: got nan, expected a number"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes: got 0, expected a positive integer"),
        ({"chunk_bytes": 1e6}, ValueError, "chunk_bytes: got 1000000.0, expected a positive integer"),
        ({"correct": [1, 2, 3]}, TypeError, "correct: got list, expected an int64 tensor [3]"),
        ({"correct": ids.float()}, TypeError, "correct: got dtype torch.float32, expected int64"),
        ({"wrong": ids[:2]}, ValueError, "wrong: got shape (2,), expected (3,)"),
        ({"wrong": ids.to("meta")}, ValueError, f"wrong: got a tensor on meta, expected one on {here}"),
        ({"kl": "both"}, ValueError, "kl: got 'both', expected 'forward' or 'reverse'"),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(statistics_with(h, **changes), kind) == message
        assert error_of(loss_with(h, reference, **changes), kind) == message


@over()
def test_the_loss_refuses_a_direction_a_margin_or_scalars_of_another_kind(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8)).to(backend.device)
    reference = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    cases: Cases = [
        ({"direction": 1.0}, TypeError, "direction: got float, expected a tensor [3]"),
        ({"direction": h.direction[None]}, ValueError, "direction: got shape (1, 3), expected (3,)"),
        (
            {"direction": h.direction.clone().requires_grad_()}, ValueError,
            "direction: requires a gradient, but it is not differentiated",
        ),
        ({"margin": None}, TypeError, "margin: got NoneType, expected a number"),
        ({"margin": float("nan")}, ValueError, "margin: got nan, expected a number"),
        ({"scalars": [0.1]}, TypeError, "scalars: got list, expected a floating-point tensor of any shape"),
        (
            {"scalars": h.steered.to("meta")}, ValueError,
            f"scalars: got a tensor on meta, expected one on {h.weight.device}",
        ),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(loss_with(h, reference, **changes), kind) == message


@over()
def test_statistics_of_other_rows_or_another_head_are_refused(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8)).to(backend.device)
    made = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    logits = ops.reference_statistics(h.frozen, h.weight, *h.answers, keep_logits=True)
    assert made.mean is not None
    assert logits.logits is not None
    cases: Cases = [
        ({"reference": None}, TypeError, "reference: got NoneType, expected ReferenceStatistics"),
        ({"reference": logits.logits}, TypeError, "reference: got Tensor, expected ReferenceStatistics"),
        ({"reference": made[:2]}, ValueError, "reference: got 2 rows, expected 3 as hidden has"),
        (
            {"exclude_answers": False}, ValueError,
            "exclude_answers: got False, expected True as the reference was made with",
        ),
        ({"logit_scale": 0.5}, ValueError, "logit_scale: got 0.5, expected 1.0 as the reference was made with"),
        ({"softcap": 30.0}, ValueError, "softcap: got 30.0, expected None as the reference was made with"),
        (
            {"reference": dataclasses.replace(made, mean=made.mean[:, 1:])}, ValueError,
            "reference: got statistics of width 7, expected 8",
        ),
        (
            {"reference": dataclasses.replace(logits, logits=logits.logits[:, 1:])}, ValueError,
            "reference: got statistics of width 30, expected 31",
        ),
        (
            {"reference": made.to("meta")}, ValueError,
            f"reference: got a tensor on meta, expected one on {h.weight.device}",
        ),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(loss_with(h, **{"reference": made, **changes}), kind) == message
    for changes in ({"kl": "reverse"}, {"softcap": 4.0}):
        kept = ops.reference_statistics(h.frozen, h.weight, *h.answers, **changes)
        assert kept.mean is None
        assert kept.logits is not None
        loss_with(h, kept, **changes)()


@over()
def test_statistics_without_logits_are_refused_where_these_are_needed(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8), bias=True).to(backend.device)
    assert h.bias is not None
    made = ops.reference_statistics(h.frozen, h.weight, *h.answers, bias=h.bias)
    learned: Cases = [
        ({"weight": h.weight.clone().requires_grad_()}, ValueError, "a head that learns"),
        ({"bias": h.bias.clone().requires_grad_()}, ValueError, "a head that learns"),
    ]
    for changes, kind, reason in [({"kl": "reverse"}, ValueError, "the reverse KL"), *learned]:
        message = error_of(loss_with(h, made, **changes), kind)
        assert message == (
            f"reference: got statistics without logits, which {reason} needs; expected"
            " reference_statistics(..., keep_logits=True)"
        )
    with torch.no_grad():  # nothing is learned there
        for changes, *_ in learned:
            loss_with(h, made, **changes)()


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_on_cpu_tensors_wrong_values_are_refused_with_their_row(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8))
    h.correct, h.wrong = torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    reference = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    ids: list[tuple[dict[str, Tensor], str]] = [
        ({"correct": torch.tensor([4, 31, 6])}, "correct: row 1 has token id 31, expected 0 to 30"),
        ({"wrong": torch.tensor([7, 8, -1])}, "wrong: row 2 has token id -1, expected 0 to 30"),
    ]
    for changes, message in ids:
        for options in ({}, {"keep_logits": True}, {"softcap": 3.0}):
            assert error_of(statistics_with(h, **changes, **options), ValueError) == message
        assert error_of(loss_with(h, reference, **changes), ValueError) == message
    more: list[tuple[dict[str, Tensor], str]] = [
        ({"wrong": torch.tensor([7, 5, 9])}, "wrong: row 1 has token id 5, the same as correct"),
        ({"direction": torch.tensor([1.0, -1.0, 0.5])}, "direction: row 2 is 0.5, expected 1 or -1"),
    ]
    for changes, message in more:
        assert error_of(loss_with(h, reference, **changes), ValueError) == message


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_on_cpu_tensors_statistics_without_other_answers_are_refused(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 31, 8))
    h.correct, h.wrong = torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    reference = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    other = torch.tensor([4, 11, 6])
    message = error_of(loss_with(h, reference, correct=other), ValueError)
    assert message == "correct: row 1 has token id 11, expected 5 or 8 as the reference was made without"
    message = error_of(loss_with(h, reference[torch.tensor([1, 0, 2])]), ValueError)
    assert message == "correct: row 0 has token id 4, expected 5 or 8 as the reference was made without"
    loss_with(h, reference, correct=h.wrong, wrong=h.correct)()  # the same tokens are left out
    all_tokens = ops.reference_statistics(h.frozen, h.weight, *h.answers, exclude_answers=False)
    loss_with(h, all_tokens, correct=other, exclude_answers=False)()
    kept = ops.reference_statistics(h.frozen, h.weight, *h.answers, kl="reverse")
    loss_with(h, kept, correct=other, kl="reverse")()


@pytest.mark.parametrize("options", [{}, {"exclude_answers": False}, {"kl": "reverse"}], ids=str)
@over(backends=["reference", "triton", "cuda"], dtypes=DTYPES)
def test_where_ids_are_not_read_one_out_of_range_makes_its_row_nan_and_no_other(
    backend: Backend, dtype: torch.dtype, options: dict[str, Any], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the checks of CPU tensors' values are left out."""
    monkeypatch.setattr(checks, "ids_in_range", lambda *arguments: None)
    monkeypatch.setattr(linear_intervention_loss, "check_answers", lambda *arguments: None)
    for vocab in (2, 40):
        h = head(inputs, (4, vocab, 8), dtype, bias=True)
        h.correct, h.wrong = torch.tensor([0, vocab, 1, 1]), torch.tensor([1, 0, -1, 0])
        effectiveness, faithfulness, gradient = run(h.to(backend.device), margin=30.0, **options)
        for values in (effectiveness, faithfulness, gradient.sum(-1)):
            assert values.isnan().tolist() == [False, True, True, False]


@over(dtypes=DTYPES, backends=["triton", "cuda"])
def test_the_kernels_between_the_products_read_nothing_outside_the_row(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    h = head(inputs, (3, 40, 8), dtype).to(backend.device)
    huge = torch.tensor([0, 1 << 40, -(1 << 40)], device=backend.device)
    log_sum, mean, mean_bias, answers = linear_softmax.linear_softmax(
        h.frozen, h.weight, None, huge, torch.ones_like(huge) * 2, True, 1.0, 1 << 20
    )
    for values in (log_sum, mean.sum(-1), mean_bias, answers.sum(-1)):
        assert values.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("exclude", [True, False])
@over()
def test_an_answer_that_is_both_is_left_out_once_and_has_its_logit_twice(
    backend: Backend, exclude: bool, inputs: Inputs
) -> None:
    """As first tokens of answers of several tokens, or where another process holds the other answer."""
    h = head(inputs, (3, 40, 8)).to(backend.device)
    ids = torch.tensor([0, 17, 39], device=backend.device)
    given = (h.frozen, h.weight, None, ids, ids, exclude, 1.0, 1 << 20)
    found, expected = linear_softmax.linear_softmax(*given), linear_softmax.in_chunks(*given)
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
