"""What is special to the C++ softmax over a vocabulary: instruction levels, splits, memory it must not touch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import DTYPES, Inputs
from torch import Tensor

from actscale_fast.ops.losses.linear_softmax import in_chunks

_C = pytest.importorskip("actscale_fast.ops._C", reason="the C++ extension was not built", exc_type=ModuleNotFoundError)
cpu = pytest.importorskip("actscale_fast.ops.cpu")
TYPES = pytest.importorskip("actscale_fast.ops.calls").TYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LEVELS = _C.levels()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = _C.level(), torch.get_num_threads()
    yield
    _C.set_level(level)
    torch.set_num_threads(threads)


def arguments(inputs: Inputs, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool = True) -> tuple[object, ...]:
    """Positional arguments of `BackendModule.linear_softmax`."""
    rows, vocab, width = shape
    ids = inputs.rows(rows, vocab)
    return (
        inputs.normal(rows, width, dtype=dtype), inputs.normal(vocab, width, dtype=dtype, scale=3 / width**0.5),
        inputs.normal(vocab) if bias else None, ids.correct, ids.wrong, True, 0.8, 1 << 24,
    )  # fmt: skip


def double(given: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given)


# rows: within a vector, a group and beyond it; a vocabulary below, at and above a split
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 31, 7), (3, 8193, 40), (67, 2500, 64), (17, 300, 576), (2, 12289, 1)], ids=str)
def test_every_level_is_as_exact_as_float32_can_be(
    shape: tuple[int, int, int], dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, shape, dtype)
    exact = in_chunks(*double(given))  # type: ignore[arg-type]
    for level in LEVELS:
        _C.set_level(level)
        log_sum, mean, mean_bias, answers = cpu.linear_softmax(*given)
        torch.testing.assert_close(log_sum, exact[0], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean_bias, exact[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answers.double(), exact[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_gives_the_same_bits_for_every_number_of_threads_and_every_bound_on_memory(
    dtype: torch.dtype, level: str, inputs: Inputs
) -> None:
    _C.set_level(level)
    given = arguments(inputs, (70, 9001, 24), dtype)
    results = []
    for threads, chunk_bytes in ((1, 1 << 24), (2, 1 << 24), (3, 1), (2, 64 * 2 * 40 * 4)):
        torch.set_num_threads(threads)
        results.append(cpu.linear_softmax(*given[:-1], chunk_bytes))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_outputs_is_written(dtype: torch.dtype, level: str, inputs: Inputs) -> None:
    _C.set_level(level)
    given = arguments(inputs, (5, 500, 33), dtype)
    expected = cpu.linear_softmax(*given)
    guarded = [torch.full((t.numel() + 128,), 7.0, dtype=t.dtype) for t in expected]
    outputs = [g[64 : 64 + t.numel()] for g, t in zip(guarded, expected, strict=True)]
    log_sum, mean, mean_bias, answers = outputs
    hidden, weight, bias, correct, wrong = (t for t in given[:5] if isinstance(t, Tensor))
    _C.linear_softmax(
        type=TYPES[dtype], rows=5, vocab=500, width=33, hidden=hidden, hidden_stride=33, weight=weight,
        weight_stride=33, bias=bias, correct=correct, wrong=wrong, exclude_answers=True, scale=0.8, bytes=1 << 24,
        log_sum=log_sum, mean=mean, mean_bias=mean_bias, answers=answers, threads=2,
    )  # fmt: skip
    for whole, values, wanted in zip(guarded, outputs, expected, strict=True):
        assert torch.equal(values.view(wanted.shape), wanted)
        assert (whole[:64] == 7).all()
        assert (whole[-64:] == 7).all()


def test_a_bad_token_id_is_refused_before_anything_is_written(inputs: Inputs) -> None:
    hidden, weight, bias, correct, wrong, *rest = arguments(inputs, (3, 20, 4), torch.float32)
    for name, ids in (("correct", torch.tensor([0, 20, 1])), ("wrong", torch.tensor([0, -1, 1]))):
        pair = {"correct": correct, "wrong": wrong, name: ids}
        with pytest.raises(ValueError, match=f"{name}: row 1 has token id {int(ids[1])}, expected 0 to 19"):
            cpu.linear_softmax(hidden, weight, bias, pair["correct"], pair["wrong"], *rest)
