"""What is CUDA's own in the CUDA kernels, on an emulated device: clusters, rows kept on chip or read twice, alignment.

That they compute the right thing under every shape, dtype and edge case is what the tests of the ops claim of all
backends (`test_ops_loss` and its like); there too the CUDA backend runs emulated where no GPU is.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation.emulation import A100, H100, SMALL, Limits, emulated_backend
from op_cases import DTYPES, Inputs, Rows, assert_as_exact_as_eager, error_of, textbook_losses
from torch import Tensor

from actscale_fast.ops import cuda
from actscale_fast.ops.calls import TYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def device() -> Iterator[ModuleType]:
    """The emulated device; `set_limits` makes it smaller."""
    with emulated_backend() as kernels:
        yield kernels


def loss_of(rows: Rows, scalars: Tensor | None = None, need_grad: bool = True, **options: Any) -> tuple[Tensor, ...]:
    return cuda.intervention_loss(
        rows.logits, rows.reference, rows.correct, rows.wrong, rows.direction, scalars, options.get("margin", 1.0),
        options.get("inverse_temperature", 1.0), options.get("exclude_answers", True), options.get("reverse", False),
        need_grad,
    )  # fmt: skip


def assert_losses_match(got: tuple[Tensor, ...], rows: Rows, reverse: bool = False) -> None:
    ones = torch.ones(len(rows.logits))
    kl = "reverse" if reverse else "forward"
    exact, eager = (textbook_losses(rows, (ones, ones), dtype, kl=kl) for dtype in (torch.float64, torch.float32))
    assert_as_exact_as_eager("effectiveness", got[0], exact.effectiveness, eager.effectiveness)
    condition = 4 * exact.value_condition
    assert_as_exact_as_eager("faithfulness", got[1], exact.faithfulness, eager.faithfulness, condition=condition)
    assert_as_exact_as_eager("gradient", got[2], exact.gradient, eager.gradient, condition=4 * exact.gradient_condition)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True))


def limits_for(kernels: ModuleType, cluster: int, rows: Rows, kept: bool = True) -> Limits:
    """A device so small that these rows need a cluster of just that size; or that no cluster of it holds them."""
    vocab, size = rows.logits.shape[1], rows.logits.element_size()
    vectors = -(-(vocab + 16 // size - 1) // (16 // size))
    block = 512 + 32 * -(-vectors // cluster) if kept else 512 + 2 * 16 * 3 * 1024
    limits = (1, block, 2 * (block + 1024), 1024, cluster if kept else 1)
    found = kernels.cuda.loss_plan(len(rows.logits), vocab, size, limits)
    assert (found[0], found[2]) == (cluster, kept), found
    return limits


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cluster_and_the_second_read_give_the_losses_of_the_formulas(
    inputs: Inputs, device: ModuleType, dtype: torch.dtype, reverse: bool
) -> None:
    rows = inputs.rows(2, 1531, dtype)
    for cluster in (1, 2, 4, 8, 16):
        device.set_limits(*limits_for(device, cluster, rows))
        results = loss_of(rows, reverse=reverse)
        assert_losses_match(results, rows, reverse)
        assert same(results, loss_of(rows, reverse=reverse))
    wide = inputs.rows(1, 30011 if dtype == torch.float32 else 50257, dtype)
    device.set_limits(*limits_for(device, 1, wide, kept=False))
    assert_losses_match(loss_of(wide, reverse=reverse), wide, reverse)


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_the_order_in_which_threads_run_changes_no_bit(inputs: Inputs, device: ModuleType, cluster: int) -> None:
    rows, scalars = inputs.rows(3, 1003, torch.bfloat16), inputs.normal(700)
    device.set_limits(*limits_for(device, cluster, rows))
    forwards = loss_of(rows, scalars)
    device.run_threads_backwards(True)
    assert same(forwards, loss_of(rows, scalars))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "read_twice"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_equal_rows_give_exactly_zero_however_they_are_cut(
    inputs: Inputs, device: ModuleType, kept: bool, reverse: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = inputs.rows(2, 2051 if kept else 50258, dtype, scale=9.0)
        rows = rows._replace(reference=rows.logits.clone())
        for cluster in (1, 2, 8) if kept else (1,):
            device.set_limits(*limits_for(device, cluster, rows, kept))
            for exclude in (True, False):
                options = {"exclude_answers": exclude, "reverse": reverse, "inverse_temperature": 1.7}
                results = loss_of(rows, margin=-1e6, **options)
                assert all((result == 0).all() for result in results[:4])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 31, 517])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere_give_the_same_bits_as_contiguous_ones(
    inputs: Inputs, device: ModuleType, dtype: torch.dtype, width: int
) -> None:
    """The vectors lie on the gradient's grid, so a slice or an offset changes how a row is read and nothing else."""
    rows = inputs.rows(3, width, dtype)
    plain = loss_of(rows)
    for stride, starts in ((width + 5, (0, 3)), (3 * width, (1, 1)), (width + 8, (7, 2)), (width, (5, 0))):
        sides = []
        for values, start in zip(rows[:2], starts, strict=True):
            memory = torch.full((start + 3 * stride,), torch.nan, dtype=dtype)
            sides.append(memory.as_strided((3, width), (stride, 1), start).copy_(values))
        assert same(plain, loss_of(Rows(*sides, *rows[2:])))


@pytest.mark.parametrize("cluster", [1, 4])
def test_nothing_outside_of_the_outputs_is_written(inputs: Inputs, device: ModuleType, cluster: int) -> None:
    """The gradient's neighbours in memory keep their values; the rows end off the 16-byte grid."""
    rows = inputs.rows(3, 421, torch.bfloat16)
    rows.correct[1] = 421
    device.set_limits(*limits_for(device, cluster, rows))
    memory = torch.full((3 * 421 + 64,), 5.0, dtype=torch.bfloat16)
    small = torch.full((64,), 5.0)
    for start in (32, 33, 39):
        memory.fill_(5.0), small.fill_(5.0)
        device.cuda.intervention_loss(
            type=TYPES[torch.bfloat16], rows=3, vocab=421, logits=rows.logits, logits_stride=421,
            reference=rows.reference, reference_stride=421, correct=rows.correct, wrong=rows.wrong,
            direction=rows.direction, margin=1.0, inverse_temperature=1.0, exclude_answers=True, reverse=False,
            effectiveness=small[4:], faithfulness=small[16:], grad=memory[start:], answer_grad=small[32:],
        )  # fmt: skip
        assert (memory[:start] == 5).all()
        assert (memory[start + 3 * 421 :] == 5).all()
        # A row is dealt out by the grid of its gradient: off the grid its sums are added in another order.
        got, aligned = memory[start : start + 3 * 421].view(3, 421), loss_of(rows)[2]
        torch.testing.assert_close(got, aligned, rtol=2**-7, atol=1e-6, equal_nan=True)
        written = torch.zeros(64, dtype=torch.bool)
        written[4:7] = written[16:19] = written[32:41] = True
        assert (small[~written] == 5).all()


def test_a_gradient_in_the_logits_memory_is_the_same_gradient(inputs: Inputs, device: ModuleType) -> None:
    for rows, cluster, kept in (
        (inputs.rows(3, 421, torch.bfloat16), 1, True),
        (inputs.rows(3, 421), 4, True),
        (inputs.rows(2, 50257, torch.bfloat16), 1, False),
    ):
        device.set_limits(*limits_for(device, cluster, rows, kept))
        for backwards in (False, True):
            device.run_threads_backwards(backwards)
            apart, logits = loss_of(rows), rows.logits.clone()
            arguments = (logits, *rows[1:], None, 1.0, 1.0, True, False, True)
            within = cuda.intervention_loss(*arguments, in_place=True)
            assert within[2].data_ptr() == logits.data_ptr()
            assert same(apart, within)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_and_weighted_rows_are_the_same_however_they_are_cut(
    inputs: Inputs, device: ModuleType, dtype: torch.dtype
) -> None:
    """Vectors at the row's ends hold what lies beyond as −inf, which the cap must not make a possible token."""
    rows, weight = inputs.rows(3, 1531, dtype), torch.tensor([2.0, 0.0, -0.5])
    rows.logits[1] = torch.nan
    arguments = (*rows[:2], None, None, None, None, 0.0, 0.7, False)
    for reverse in (False, True):
        z, r = (5 * torch.tanh(side.double() / 5) * 0.7 for side in (rows.logits.nan_to_num(), rows.reference))
        log_w, log_o = (t.log_softmax(-1) for t in ((z, r) if reverse else (r, z)))
        exact = weight * (log_w.exp() * (log_w - log_o)).sum(-1)
        gradients = []
        for cluster, kept in ((1, True), (4, True), (1, False)):
            device.set_limits(*limits_for(device, cluster, rows) if kept else (1, 512 + 2 * 16 * 3 * 1024, 10**6, 0, 1))
            losses = cuda.intervention_loss(*arguments, reverse, True, weight, 5.0)
            torch.testing.assert_close(losses[1].double(), exact, rtol=1e-5, atol=1e-6)
            assert not losses[2][1].any()
            gradients.append(losses[2])
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_weights_of_the_gradient_are_in_it_however_the_rows_are_cut(
    inputs: Inputs, device: ModuleType, reverse: bool
) -> None:
    rows, weights = inputs.rows(2, 1531), inputs.normal(2, 2)
    arguments = (*rows, None, 4.0, 1.0, False, reverse, True, None, None)
    kl = "reverse" if reverse else "forward"
    options: dict[str, Any] = {"margin": 4.0, "exclude_answers": False, "kl": kl}
    exact, eager = (
        textbook_losses(rows, (weights[:, 0], weights[:, 1]), dtype, **options)
        for dtype in (torch.float64, torch.float32)
    )
    for cluster, kept in ((1, True), (4, True), (1, False)):
        device.set_limits(*limits_for(device, cluster, rows) if kept else (1, 512 + 2 * 16 * 3 * 1024, 10**6, 0, 1))
        plain, got = cuda.intervention_loss(*arguments), cuda.intervention_loss(*arguments, weights)
        assert same(plain[:2], got[:2])
        condition = 4 * exact.gradient_condition
        assert_as_exact_as_eager("gradient", got[2], exact.gradient, eager.gradient, condition=condition)
        torch.testing.assert_close(got[3], plain[3] * weights[:, [1, 1, 0]])


@pytest.mark.parametrize("cluster", [1, 4])
def test_a_row_of_weight_zero_is_not_read(inputs: Inputs, device: ModuleType, cluster: int) -> None:
    """Its logits would lie where no memory is."""
    rows, weight = inputs.rows(2, 1531), torch.tensor([1.0, 0.0])
    device.set_limits(*limits_for(device, cluster, rows))
    losses, grad, answers = torch.empty(2, 2), torch.empty(2, 1531), torch.empty(2, 3)
    device.cuda.intervention_loss(
        type=TYPES[torch.float32], rows=2, vocab=1531, logits=rows.logits, logits_stride=1 << 44,
        reference=rows.reference, reference_stride=1 << 44, correct=None, wrong=None, direction=None,
        row_weight=weight, margin=0.0, inverse_temperature=1.0, exclude_answers=False, reverse=False,
        effectiveness=losses[0], faithfulness=losses[1], grad=grad, answer_grad=answers,
    )  # fmt: skip
    assert losses[1, 0] > 0
    assert losses[1, 1] == 0
    assert grad[0].any()
    assert not grad[1].any()
    assert not answers.any()


@pytest.mark.parametrize("bad", [-1, 700, 2**31 + 5, 2**40, -(2**40)])
@pytest.mark.parametrize("cluster", [1, 4])
def test_a_token_id_out_of_range_makes_its_row_nan_and_no_other(
    inputs: Inputs, device: ModuleType, cluster: int, bad: int
) -> None:
    rows = inputs.rows(3, 700)
    device.set_limits(*limits_for(device, cluster, rows))
    good = loss_of(rows)
    for name in ("correct", "wrong"):
        ids = getattr(rows, name).clone()
        ids[1] = bad
        broken = loss_of(rows._replace(**{name: ids}))
        for before, after in zip(good[:4], broken[:4], strict=True):
            assert after[1].isnan().all()
            assert torch.equal(before[[0, 2]], after[[0, 2]])
        for upstream in (torch.ones(3), torch.full((3,), 0.5)):
            scaled = broken[2].clone()
            cuda.intervention_loss_scale_(
                scaled, rows.direction, upstream, *rows._replace(**{name: ids})[2:4], broken[3]
            )
            assert scaled[1].isnan().all()
            assert scaled[[0, 2]].isfinite().all()


def test_no_columns_are_no_divergence_and_no_rows_still_sum_the_scalars(inputs: Inputs, device: ModuleType) -> None:
    scalars = inputs.normal(2, 3, 700)
    rows = inputs.rows(2, 40)
    for some in (rows, Rows(*(value[:0] for value in rows))):
        *results, l1, sign = loss_of(some, scalars)
        assert l1.item() == pytest.approx(scalars.double().abs().sum().item(), rel=1e-6)
        assert torch.equal(sign, scalars.sign())
        assert results[3].shape == (len(some.logits), 3)
    assert loss_of(rows, scalars[:0])[4] == 0
    empty = cuda.intervention_loss(
        rows.logits[:, :0], rows.reference[:, :0], None, None, None, None, 1.0, 1.0, True, False, True
    )
    assert all((result == 0).all() for result in empty[:4])
    assert len(empty[1]) == 2


def test_the_loss_and_its_scaling_are_one_launch_each(inputs: Inputs, device: ModuleType) -> None:
    rows = inputs.rows(5, 131)
    before = device.launches()
    results = loss_of(rows, inputs.normal(30))
    assert device.launches() == before + 1
    cuda.intervention_loss_scale_(results[2], rows.direction, rows.direction, rows.correct, rows.wrong, results[3])
    assert device.launches() == before + 2
    none = Rows(*(value[:0] for value in rows))
    cuda.intervention_loss_scale_(none.logits, *none[4:] * 2, *none[2:4], results[3][:0])
    loss_of(none)
    assert device.launches() == before + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_scaled_by_several_blocks_as_by_one(inputs: Inputs, device: ModuleType, dtype: torch.dtype) -> None:
    """Rows of four steps; on a device of many multiprocessors each step is a block's."""
    rows = inputs.rows(3, 20011, dtype)
    saved, answers = (loss_of(rows)[i] for i in (2, 3))
    d_e, d_f = torch.tensor([0.3, 1.0, 2.0]), torch.tensor([-2.0, 1.0, 1.0])
    results = []
    for processors in (132, 1):
        device.set_limits(processors, *SMALL[1:])
        results.append(saved.clone())
        cuda.intervention_loss_scale_(results[-1], d_e, d_f, rows.correct, rows.wrong, answers)
    assert torch.equal(*results)
    expected = (saved.float() * d_f[:, None]).to(dtype)
    hinge = d_e * answers[:, 2]
    expected[range(3), rows.correct] = (d_f * answers[:, 0] + hinge).to(dtype)
    expected[range(3), rows.wrong] = (d_f * answers[:, 1] - hinge).to(dtype)
    assert torch.equal(results[0], expected)


def test_a_launch_that_the_device_refuses_is_an_error_that_names_the_op(inputs: Inputs, device: ModuleType) -> None:
    rows = inputs.rows(2, 40)
    device.set_limits(4, 256, 65536, 1024, 1)  # less shared memory than any plan needs
    assert error_of(lambda: loss_of(rows), RuntimeError) == "intervention_loss: CUDA says: invalid argument"


@pytest.mark.parametrize(
    ("limits", "rows", "vocab", "size", "cluster", "kept"),
    [
        (H100, 8192, 32000, 2, 2, True),  # 128 KB a row: two blocks of 64 KB, three of them a multiprocessor
        (H100, 8192, 50257, 2, 2, True),
        (H100, 8192, 128256, 2, 8, True),
        (H100, 8192, 151936, 2, 8, True),
        (H100, 8192, 262144, 2, 8, True),
        (H100, 8192, 262144, 4, 16, True),  # beyond what every device can put into a cluster
        (H100, 8192, 600000, 4, 1, False),
        (H100, 32, 50257, 2, 8, True),  # few rows: more blocks each
        (H100, 8, 50257, 2, 8, True),
        (H100, 8, 1000, 2, 1, True),  # too little work to cut
        (A100, 8192, 32000, 2, 1, True),  # no clusters: one block, or a second read
        (A100, 8192, 50257, 2, 1, False),
        (A100, 8192, 128256, 4, 1, False),
    ],
)
def test_the_launch_is_a_closed_form_of_the_rows_and_the_device(
    device: ModuleType, limits: Limits, rows: int, vocab: int, size: int, cluster: int, kept: bool
) -> None:
    plan = device.cuda.loss_plan(rows, vocab, size, limits)
    assert (plan[0], plan[2]) == (cluster, kept)
    assert plan[3] <= limits[1]


def test_a_device_that_cannot_form_the_largest_cluster_reads_the_row_twice(device: ModuleType) -> None:
    assert device.cuda.loss_plan(8192, 262144, 4, (*H100[:4], 8))[:3:2] == (1, False)
