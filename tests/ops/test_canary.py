"""The first call of each kernel is compared with the reference; one that fails is not used again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import Inputs

from actscale_fast import ops
from actscale_fast.ops import backends, canary, registry, verdicts

pytestmark = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="needs the C++ kernels")

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(canary, "passed", set())
    verdicts.distrusted.clear()
    backends.reconsider()
    with backends.use_backend("auto"):
        yield
    verdicts.distrusted.clear()
    backends.reconsider()


def calls(inputs: Inputs) -> dict[str, Any]:
    """A call with gradients per function of a backend, in which each kernel is used once."""
    x, alpha = inputs.normal(2, 3, 4, 8).requires_grad_(), inputs.normal(1, 1, 4).requires_grad_()
    weight = inputs.normal(4, 8).requires_grad_()
    rows = inputs.rows(3, 40)
    logits = rows.logits.requires_grad_()
    hidden, head = inputs.normal(3, 8).requires_grad_(), inputs.normal(40, 8)
    state = [inputs.normal(5).abs() for _ in range(4)]

    def loss() -> tuple[torch.Tensor, ...]:
        losses = ops.intervention_loss(logits, *rows[1:4], direction=rows.direction)
        return torch.autograd.grad(losses[0].sum() + 2 * losses[1].sum(), logits)

    def linear() -> object:
        reference = ops.reference_statistics(hidden.detach(), head, rows.correct, rows.wrong)
        return ops.linear_intervention_loss(hidden, head, reference, rows.correct, rows.wrong, direction=rows.direction)

    return {
        "scale_heads": lambda: torch.autograd.grad(ops.scale_heads(x, alpha).sum(), (x, alpha)),
        "dynamic_scale": lambda: torch.autograd.grad(ops.dynamic_scale(x, weight).sum(), (x, weight)),
        "scale_channels": lambda: torch.autograd.grad(ops.scale_channels(x, weight[0]).sum(), (x, weight)),
        "intervention_loss": loss,
        "linear_softmax": linear,
        "proximal_adam_": lambda: ops.proximal_adam_(*state, torch.zeros(()), lr=0.1),
    }


def test_every_kernel_passes_its_canary_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    watched = canary.watched
    monkeypatch.setattr(
        canary, "watched", lambda backend, name, *rest: compared.append(name) or watched(backend, name, *rest)
    )  # type: ignore[func-returns-value]
    for call in calls(inputs).values():
        call()
        call()
    assert sorted(compared) == sorted(canary._PARTS)
    assert {name for _, name, _, _ in canary.passed} == set(canary._PARTS)


@pytest.mark.parametrize("name", sorted(set(canary._PARTS) - {"intervention_loss_scale_", "proximal_adam_"}))
def test_a_wrong_kernel_is_replaced_by_the_reference_with_a_warning(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call = calls(inputs)[registry.op_of(name)]
    with backends.use_backend("reference"):
        expected = call()
    _break(monkeypatch, name)
    with pytest.warns(RuntimeWarning, match=f"{name}: the cpu kernel disagrees with plain PyTorch for torch.float32"):
        got = call()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert backends.resolve(torch.device("cpu"), FLOAT, registry.op_of(name)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_a_wrong_loss_that_has_overwritten_its_logits_is_an_error(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = inputs.rows(3, 40)
    leaf = rows.logits.requires_grad_()
    _break(monkeypatch, "intervention_loss")
    with (
        pytest.warns(RuntimeWarning, match="intervention_loss: the cpu kernel disagrees"),
        pytest.raises(RuntimeError, match="intervention_loss: the cpu kernel has changed its arguments wrongly"),
    ):
        ops.intervention_loss(leaf * 1, *rows[1:4], direction=rows.direction, inplace_gradient=True)


def test_a_kernel_that_overwrites_its_arguments_with_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.module("cpu")
    monkeypatch.setattr(module, "proximal_adam_", lambda parameter, *rest: parameter.fill_(torch.nan))
    state = [torch.ones(5) for _ in range(4)]
    with (
        pytest.warns(RuntimeWarning, match="proximal_adam_: the cpu kernel disagrees"),
        pytest.raises(RuntimeError, match="proximal_adam_: the cpu kernel has changed its arguments wrongly"),
    ):
        ops.proximal_adam_(*state, torch.zeros(()), lr=0.1)


@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_a_step_that_cancels_its_parameter_is_no_alarm(rate: float) -> None:
    for count in (1, 5, 64):
        canary.passed.clear()
        parameter, zeros = torch.full((count,), rate), [torch.zeros(count) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.proximal_adam_(parameter, torch.ones(count), *zeros, torch.zeros(()), lr=rate)


def test_what_is_not_a_number_is_no_alarm_and_no_proof(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = inputs.rows(3, 40)
    for value in (torch.nan, torch.inf):
        logits = rows.logits.clone()
        logits[:, 7] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.kl_div_from_logits(logits, rows.reference)
    assert not canary.passed
    _break(monkeypatch, "intervention_loss")
    with pytest.warns(RuntimeWarning, match="intervention_loss: the cpu kernel disagrees"):
        ops.kl_div_from_logits(rows.logits, rows.reference)


def test_autocast_is_no_alarm(inputs: Inputs) -> None:
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(inputs)["linear_softmax"]()


def test_a_mask_hides_no_wrong_kernel(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = inputs.rows(3, 40)
    masked = torch.arange(40) % 5 == 4
    logits, reference = (side.masked_fill(masked, torch.finfo(torch.float32).min) for side in rows[:2])
    _break(monkeypatch, "intervention_loss")
    with pytest.warns(RuntimeWarning, match="intervention_loss: the cpu kernel disagrees"):
        ops.kl_div_from_logits(logits, reference)


@pytest.mark.parametrize("name", ["intervention_loss_scale_", "proximal_adam_"])
def test_a_wrong_kernel_that_has_overwritten_its_arguments_is_an_error(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call = calls(inputs)[registry.op_of(name)]
    _break(monkeypatch, name)
    with (
        pytest.warns(RuntimeWarning, match=f"{name}: the cpu kernel disagrees"),
        pytest.raises(RuntimeError, match=f"{name}: the cpu kernel has changed its arguments wrongly"),
    ):
        call()


def test_a_wrong_kernel_of_a_backend_that_was_asked_for_by_name_is_an_error(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, "scale_heads")
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="so backend 'cpu' cannot be used for it"):
        calls(inputs)["scale_heads"]()


def test_a_graph_that_was_compiled_before_runs_the_reference_after_its_kernel_failed(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, alpha = inputs.normal(2, 3, 4, 8), inputs.normal(1, 1, 4)
    compiled = torch.compile(lambda x: ops.scale_heads(x, alpha), backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    canary.passed.clear()
    _break(monkeypatch, "scale_heads")
    with pytest.warns(RuntimeWarning, match="scale_heads: the cpu kernel disagrees"):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)


def test_a_backward_pass_takes_the_kernels_of_its_forward_pass(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    run = registry.module("cpu").scale_heads_backward
    monkeypatch.setattr(
        registry.module("cpu"), "scale_heads_backward", lambda *arguments: used.append("cpu") or run(*arguments)
    )
    x = inputs.normal(2, 3, 4, 8).requires_grad_()
    y = ops.scale_heads(x, inputs.normal(1, 1, 4))
    with backends.use_backend("reference"):
        y.sum().backward()
    assert used == ["cpu"]


def test_special_values_agree_only_in_the_same_places() -> None:
    some = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
    assert canary._agree(some, some.clone(), 0.0)
    for index, value in ((1, 3.0), (2, 0.0), (3, torch.inf), (0, torch.nan), (0, 1.1)):
        other = some.clone()
        other[index] = value
        assert not canary._agree(other, some, 0.0)


def _break(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the kernel's first floating result one per cent too large."""
    module = registry.module("cpu")
    right = getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        results = right(*arguments, **options)
        changed = results[0] if isinstance(results, tuple) else results
        (arguments[0] if changed is None else changed).mul_(1.01).add_(0.01)
        return results

    monkeypatch.setattr(module, name, wrong)
