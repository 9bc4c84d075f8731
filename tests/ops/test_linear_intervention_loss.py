"""The losses from hidden states against float64 formulas: values, gradients, identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import check, head, logits_of, run
from op_cases import DTYPES, Backend, Inputs, over
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actscale_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "logit_scale": {"bias": True, "logit_scale": 0.3},
    "all tokens": {"exclude_answers": False},
    "softcap": {"softcap": 4.0, "logit_scale": 1.7},
    "reverse": {"kl": "reverse", "bias": True},
}


@over(dtypes=DTYPES, shapes=[(3, 31, 8), (5, 257, 33)], native_shapes=[(33, 5003, 100), (4, 50257, 64)])
def test_losses_and_gradient_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int], inputs: Inputs
) -> None:
    h = head(inputs, shape, dtype)
    upstream = (inputs.normal(shape[0]).to(backend.device), inputs.normal(shape[0]).to(backend.device))
    check(h.to(backend.device), upstream, margin=2.0)


@pytest.mark.parametrize("variant", VARIANTS)
@over()
def test_every_head_and_option_matches_the_definition(backend: Backend, variant: str, inputs: Inputs) -> None:
    options = dict(VARIANTS[variant])
    how = {name: options.pop(name) for name in ("exclude_answers", "kl") if name in options}
    h = head(inputs, (6, 211, 20), **options)
    upstream = (inputs.normal(6).to(backend.device), inputs.normal(6).to(backend.device))
    check(h.to(backend.device), upstream, **how)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_finite_differences(variant: str, inputs: Inputs) -> None:
    options = dict(VARIANTS[variant])
    how = {name: options.pop(name) for name in ("exclude_answers", "kl") if name in options}
    h = head(inputs, (4, 23, 7), torch.float64, **options)
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, **h.of_head, **how)

    def losses(hidden: Tensor) -> tuple[Tensor, ...]:
        return ops.linear_intervention_loss(
            hidden, h.weight, statistics, *h.answers, direction=h.direction, margin=3.0, **h.of_head, **how
        )

    assert torch.autograd.gradcheck(losses, h.steered.requires_grad_())


@pytest.mark.parametrize("variant", VARIANTS)
@over(dtypes=DTYPES)
def test_identity_gives_exactly_zero_loss_and_gradient(
    backend: Backend, dtype: torch.dtype, variant: str, inputs: Inputs
) -> None:
    options = dict(VARIANTS[variant])
    how = {name: options.pop(name) for name in ("exclude_answers", "kl") if name in options}
    h = head(inputs, (5, 301, 24), dtype, **options).to(backend.device)
    h.steered = h.frozen
    zero, one = torch.zeros(5, device=backend.device), torch.ones(5, device=backend.device)
    _, faithfulness, gradient = run(h, (zero, one), **how)
    assert torch.equal(faithfulness, zero)
    if backend.name == "reference" and variant in ("softcap", "reverse"):  # autograd of the formulas: to rounding
        assert gradient.abs().max() < 1e-6
    else:
        assert not gradient.any()


@over(backends=["cpu"], dtypes=DTYPES)
def test_a_row_gives_the_same_bits_in_every_batch(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    h = head(inputs, (70, 9001, 40), dtype, bias=True)
    h.steered = h.frozen
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers, bias=h.bias)
    for rows in (torch.tensor([3]), torch.tensor([69, 0, 40]), torch.arange(20, 55)):
        part = ops.reference_statistics(h.frozen[rows], h.weight, h.correct[rows], h.wrong[rows], bias=h.bias)
        assert torch.equal(part.mean, statistics.mean[rows])  # type: ignore[index,arg-type]
        losses = ops.linear_intervention_loss(
            h.steered[rows], h.weight, statistics[rows], h.correct[rows], h.wrong[rows], bias=h.bias,
            direction=h.direction[rows],
        )  # fmt: skip
        assert not losses[1].any()


@over(backends=["cpu"], dtypes=DTYPES)
def test_any_number_of_threads_and_every_run_give_the_same_bits(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    h = head(inputs, (67, 20011, 48), dtype, bias=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(h))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@over(dtypes=DTYPES)
@pytest.mark.parametrize("variant", ["bias", "softcap"])
def test_in_chunks_of_one_row_losses_and_gradient_are_as_exact_as_eager(
    backend: Backend, dtype: torch.dtype, variant: str, inputs: Inputs
) -> None:
    h = head(inputs, (7, 130, 16), dtype, **VARIANTS[variant]).to(backend.device)
    upstream = (inputs.normal(7).to(backend.device), inputs.normal(7).to(backend.device))
    check(h, upstream, margin=2.0, chunk_bytes=1)
    if dtype == torch.float32:  # 16 bits round a last bit that another shape of the products moves
        for one, all_rows in zip(run(h, upstream, chunk_bytes=1), run(h, upstream), strict=True):
            torch.testing.assert_close(one, all_rows, rtol=2e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.elements = max(self.elements, tensor.numel())
        return out


@over(backends=["reference", "cpu"])
def test_no_tensor_of_all_rows_times_the_vocabulary_exists(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (32, 1000, 8))
    with LargestTensor() as largest:
        run(h, chunk_bytes=4 * 4000)
    assert largest.elements <= 8000  # W itself; four rows of logits are 4000, all of them 32000


@over()
def test_a_head_that_learns_gets_its_gradient(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (5, 67, 12), bias=True, logit_scale=0.7).to(backend.device)
    upstream = tuple(inputs.normal(5).to(backend.device) for _ in range(2))
    leaves = [t.detach().requires_grad_() for t in (h.steered, h.weight, h.bias) if t is not None]
    statistics = ops.reference_statistics(
        h.frozen, leaves[1], *h.answers, bias=leaves[2], logit_scale=0.7, chunk_bytes=2 * 67 * 4 * 3
    )
    losses = ops.linear_intervention_loss(
        leaves[0], leaves[1], statistics, *h.answers, bias=leaves[2], logit_scale=0.7, direction=h.direction,
        chunk_bytes=2 * 67 * 4 * 3,
    )  # fmt: skip
    got = torch.autograd.grad(losses, leaves, upstream)
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    z = (wide[0] @ wide[1].t() + wide[2]) * 0.7
    with ops.use_backend("reference"):
        exact = ops.intervention_loss(
            z, logits_of(h, h.frozen, torch.float64).cpu(), *(t.cpu() for t in h.answers), direction=h.direction.cpu()
        )
    expected = torch.autograd.grad(exact, wide, tuple(u.cpu().double() for u in upstream))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)


@over()
def test_the_three_terms_come_from_one_call(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (3, 40, 8)).to(backend.device)
    alpha = inputs.normal(2, 3).to(backend.device).requires_grad_()
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    *_, l1 = ops.linear_intervention_loss(
        h.steered, h.weight, statistics, *h.answers, direction=h.direction, scalars=alpha
    )
    (gradient,) = torch.autograd.grad(l1, alpha)
    torch.testing.assert_close(l1, alpha.abs().sum())
    assert torch.equal(gradient, alpha.sign())


@over()
def test_it_agrees_with_the_loss_of_logits(backend: Backend, inputs: Inputs) -> None:
    h = head(inputs, (4, 150, 16)).to(backend.device)
    z, r = (logits_of(h, hidden, torch.float32) for hidden in (h.steered, h.frozen))
    expected = ops.intervention_loss(z, r, *h.answers, direction=h.direction)
    for a, b in zip(run(h)[:2], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_statistics_are_compared_by_identity_and_keep_the_answers_they_were_made_with(inputs: Inputs) -> None:
    h = head(inputs, (4, 40, 8))
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    assert statistics == statistics
    assert statistics != ops.reference_statistics(h.frozen, h.weight, *h.answers)
    before = h.correct.clone()
    h.correct.fill_(0)
    assert torch.equal(statistics.correct, before)


def test_statistics_are_d_floats_a_row_and_can_be_picked(inputs: Inputs) -> None:
    h = head(inputs, (6, 5000, 16))
    statistics = ops.reference_statistics(h.frozen, h.weight, *h.answers)
    assert len(statistics) == 6
    assert statistics.n_bytes == 6 * (16 * 4 + 2 * 8 + 2 * 8)  # μ₀; its bias and entropy; the answers
    picked = statistics[torch.tensor([4, 1])].to("cpu")
    assert torch.equal(picked.mean[0], statistics.mean[4])  # type: ignore[index]
    assert torch.equal(picked.correct, h.correct[[4, 1]])
    assert torch.equal(picked.wrong, h.wrong[[4, 1]])
    assert len(statistics[2:5]) == 3
    p = logits_of(h, h.frozen, torch.float64).scatter(1, torch.stack(h.answers, 1), -torch.inf).softmax(-1)
    torch.testing.assert_close(statistics.mean.double(), p @ h.weight.double(), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(statistics.entropy, -(p * p.clamp(min=1e-300).log()).sum(-1), rtol=1e-5, atol=1e-5)
