"""`linear_softmax` in bfloat16 by VDPBF16PS (csrc/cpu/bf16_pairs.h): the algorithm on an emulated instruction, the code
of the real one as the compiler leaves it, and what a level needs before it is used."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_pairs
import pytest
import torch
from emulated_pairs import EmulatedPairs
from op_cases import Inputs
from torch import Tensor

from actscale_fast.ops.losses.linear_softmax import in_chunks
from actscale_fast.verification.case import Inputs as CaseInputs
from actscale_fast.verification.cases import CASES
from actscale_fast.verification.checking import check

_C = pytest.importorskip("actscale_fast.ops._C", reason="the C++ extension was not built", exc_type=ModuleNotFoundError)
cpu = pytest.importorskip("actscale_fast.ops.cpu")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> EmulatedPairs:
    if "avx2" not in _C.levels() or not emulated_pairs.CSRC.is_dir() or not emulated_pairs.knows("-fopenmp"):
        pytest.skip("needs AVX2, the source tree and a compiler")
    return EmulatedPairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(inputs: Inputs, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """Positional arguments of `BackendModule.linear_softmax`."""
    rows, vocab, width = shape
    ids = inputs.rows(rows, vocab)
    return (
        inputs.normal(rows, width, dtype=BF16), inputs.normal(vocab, width, dtype=BF16, scale=3 / width**0.5),
        inputs.normal(vocab), ids.correct, ids.wrong, True, 0.8, 1 << 24,
    )  # fmt: skip


def exact(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return in_chunks(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_emulated_instruction_adds_the_second_product_first_and_takes_tiny_numbers_for_zero(
    pairs: EmulatedPairs,
) -> None:
    total = torch.tensor([1.0, 2.0**24, 1e-40, 0.0, 0.0, torch.inf, 0.0, 2.0**-126])
    a, b = torch.zeros(8, 2, dtype=BF16), torch.ones(8, 2, dtype=BF16)
    a[0] = torch.tensor([0.5, 0.25])
    a[1] = torch.tensor([-(2.0**24), 1.0])  # 2^24 + 1 rounds to 2^24 before the first product is added
    a[3] = torch.tensor([1e-40, 1e-40])
    b[3] = torch.tensor([1e30, 1e30])
    a[4] = b[4] = torch.tensor([2.0**-64, 2.0**-65])  # their products are below 2^-126
    a[5] = torch.tensor([-torch.inf, 0.0])
    a[6] = torch.tensor([torch.nan, 1.0])
    got = pairs.dot(total, a, b)
    assert got[:5].tolist() == [1.75, 0, 0, 0, 0]
    assert got[5:7].isnan().all()
    assert got[7] == 2.0**-126


# rows: within a vector, a group and beyond it; a vocabulary below, at and above a split; odd and even widths
SHAPES = [(1, 31, 7), (3, 8193, 40), (67, 2500, 65), (17, 300, 576), (2, 12289, 1), (2, 300, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_pairs_are_as_exact_as_float32_can_be(
    shape: tuple[int, int, int], pairs: EmulatedPairs, inputs: Inputs
) -> None:
    """Above all the mean of W's rows: with weights in bfloat16 it would be ten times as far off as is allowed here."""
    given = arguments(inputs, shape)
    log_sum, mean, mean_bias, answers = pairs(*given)
    wanted = exact(given)
    torch.testing.assert_close(log_sum, wanted[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mean.double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_bias, wanted[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers.double(), wanted[3], rtol=1e-5, atol=1e-5)


def test_the_cases_of_verification_pass_on_pairs(pairs: EmulatedPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors at most twice those of plain PyTorch in bfloat16, beside rounding; a bias, offsets, a soft-cap."""
    calls = []

    def counted(*given: Any) -> tuple[Tensor, ...]:
        calls.append(given)
        return pairs(*given)

    monkeypatch.setattr(cpu, "linear_softmax", counted)
    small = itertools.islice(CASES["linear_softmax"](CaseInputs(1, BF16), 4), 6)  # the last one is large
    for case in small:
        assert check(case, "cpu", torch.device("cpu")) <= 1, case.name
    assert len(calls) >= 12


def test_pairs_give_the_same_bits_for_every_number_of_threads_and_every_bound_on_memory(
    pairs: EmulatedPairs, inputs: Inputs
) -> None:
    given = arguments(inputs, (70, 9001, 25))
    results = []
    for threads, chunk_bytes in ((1, 1 << 24), (2, 1 << 24), (3, 1), (2, 64 * 2 * 40 * 4)):
        torch.set_num_threads(threads)
        results.append(pairs(*given[:-1], chunk_bytes))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("width", [24, 25])
def test_a_row_has_the_same_bits_alone_and_beside_others(width: int, pairs: EmulatedPairs, inputs: Inputs) -> None:
    """And whatever stands beside it: also beside infinite and undefined numbers."""
    hidden, weight, bias, correct, wrong, *rest = arguments(inputs, (70, 1000, width))
    hidden[1], hidden[5] = torch.inf, torch.nan
    together = pairs(hidden, weight, bias, correct, wrong, *rest)
    for row in (0, 2, 17, 63, 64, 69):
        one = slice(row, row + 1)
        alone = pairs(hidden[one], weight, bias, correct[one], wrong[one], *rest)
        assert same(alone, tuple(values[one] for values in together)), row


@pytest.mark.parametrize("width", [8, 33])
def test_pairs_read_rows_with_any_stride_and_nothing_beside_them(
    width: int, pairs: EmulatedPairs, inputs: Inputs
) -> None:
    """The rows lie in wider ones that hold NaN elsewhere, from an odd address on."""
    hidden, weight, *rest = arguments(inputs, (9, 300, width))
    placed = []
    for tensor in (hidden, weight):
        wide = torch.full((len(tensor), width + 6), torch.nan, dtype=BF16)
        wide[:, 1 : width + 1] = tensor
        placed.append(wide[:, 1 : width + 1])
    assert same(pairs(*placed, *rest), pairs(hidden, weight, *rest))


def test_columns_that_are_masked_or_excluded_take_no_part(pairs: EmulatedPairs, inputs: Inputs) -> None:
    hidden, weight, bias, correct, wrong, *rest = arguments(inputs, (5, 700, 12))
    bias[100:650] = -torch.inf
    correct[:], wrong[:] = 3, 690
    given = (hidden, weight, bias, correct, wrong, *rest)
    got, wanted = pairs(*given), exact(given)
    for one, other in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    bias[:3], bias[4:] = -torch.inf, -torch.inf  # nothing but the excluded answer is left
    log_sum, mean, mean_bias, _ = pairs(*given)
    assert (log_sum == -torch.inf).all()
    assert not mean.any()
    assert not mean_bias.any()


def test_pairs_write_nothing_outside_the_outputs(pairs: EmulatedPairs, inputs: Inputs) -> None:
    given = arguments(inputs, (5, 500, 33))
    expected = pairs(*given)
    guarded = [torch.full((t.numel() + 128,), 7.0, dtype=t.dtype) for t in expected]
    pairs(*given, into=tuple(g[64 : 64 + t.numel()] for g, t in zip(guarded, expected, strict=True)))
    for whole, wanted in zip(guarded, expected, strict=True):
        assert torch.equal(whole[64:-64].view(wanted.shape), wanted)
        assert (whole[:64] == 7).all()
        assert (whole[-64:] == 7).all()


def test_the_compiled_level_holds_its_sums_in_registers(tmp_path: Path) -> None:
    """Its inner loop is 24 VDPBF16PS, 12 broadcasts of weights and 2 loads, and reads no stack."""
    if not emulated_pairs.CSRC.is_dir() or not emulated_pairs.gcc_version().startswith("12."):
        pytest.skip("needs the source tree and GCC 12, whose register allocation this is about")
    source, target = emulated_pairs.CSRC / "cpu" / "avx512_bf16.cpp", tmp_path / "level.s"
    flags = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", *emulated_pairs.AVX512_BF16)
    subprocess.run([*emulated_pairs.compiler(), *flags, "-S", str(source), "-o", str(target)], check=True)
    largest = max(inner_loops(target.read_text()), key=lambda loop: sum("vdpbf16ps" in line for line in loop))
    assert sum("vdpbf16ps" in line for line in largest) >= 24
    assert not [line for line in largest if "(%rsp" in line or "(%rbp)" in line]
    assert len(largest) <= 2 * 24


def inner_loops(assembly: str) -> Iterator[list[str]]:
    """The instructions between a label and a jump back to it, where no other label stands between."""
    lines = [line.strip() for line in assembly.splitlines()]
    begun: dict[str, int] = {}
    latest = -1
    for index, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            begun[label[1]] = latest = index
        elif (jump := re.match(r"j\w+\s+(\.L\w+)", line)) and begun.get(jump[1], -2) == latest:
            yield lines[latest + 1 : index + 1]


@pytest.mark.skipif("ACTSCALE_CPU_LEVEL" in os.environ, reason="a level is forced")
def test_a_level_of_the_processor_that_needs_a_verdict_is_not_in_use_without_one() -> None:
    assert _C.level() not in _C.levels_by_verdict()
    assert set(_C.levels_by_verdict()) <= set(_C.levels())
    assert set(_C.build_record()["dropped_levels"]) <= {"avx512_bf16"}


def test_the_kernel_that_a_verdict_chooses_is_as_exact(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without such a level it is the one in use."""
    monkeypatch.setattr(sys.modules["actscale_fast.ops.cpu.linear_softmax"], "by_verdict", lambda dtype: True)
    given = arguments(inputs, (67, 2500, 65))
    for got, wanted in zip(cpu.linear_softmax(*given), exact(given), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
