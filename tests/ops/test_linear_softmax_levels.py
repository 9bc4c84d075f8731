"""`linear_softmax` by VDPBF16PS (csrc/cpu/bf16_pairs.h) and by AMX (csrc/cpu/bf16_tiles.h): the algorithms on emulated
instructions and, where the processor has them, on these; the code as the compiler leaves it; what a level needs before
it is used."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_levels
import pytest
import torch
from emulated_levels import EmulatedLevel, Library
from op_cases import Inputs
from torch import Tensor

from actscale_fast.ops.losses.linear_softmax import in_chunks
from actscale_fast.verification.case import Inputs as CaseInputs
from actscale_fast.verification.cases import CASES
from actscale_fast.verification.checking import check

_C = pytest.importorskip("actscale_fast.ops._C", reason="the C++ extension was not built", exc_type=ModuleNotFoundError)
cpu = pytest.importorskip("actscale_fast.ops.cpu")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if "avx2" not in _C.levels() or not emulated_levels.CSRC.is_dir() or not emulated_levels.knows("-fopenmp"):
        pytest.skip("needs AVX2, the source tree and a compiler")
    return Library(tmp_path_factory.mktemp("levels"))


@pytest.fixture(params=[("pairs", BF16), ("tiles", BF16), ("tiles", FP16), ("tiles", FP32)], ids=str)
def kind(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    found: tuple[str, torch.dtype] = request.param
    return found


@pytest.fixture
def dtype(kind: tuple[str, torch.dtype]) -> torch.dtype:
    return kind[1]


@pytest.fixture
def level(kind: tuple[str, torch.dtype], library: Library) -> EmulatedLevel:
    return EmulatedLevel(library, tiles=kind[0] == "tiles")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(inputs: Inputs, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Positional arguments of `BackendModule.linear_softmax`."""
    rows, vocab, width = shape
    ids, scale = inputs.rows(rows, vocab), 3 / width**0.5
    return (
        inputs.normal(rows, width, dtype=dtype), inputs.normal(vocab, width, dtype=dtype, scale=scale),
        inputs.normal(vocab), ids.correct, ids.wrong, True, 0.8, 1 << 24,
    )  # fmt: skip


def exact(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return in_chunks(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_emulated_instruction_adds_the_second_product_first_and_takes_tiny_numbers_for_zero(
    library: Library,
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
    got = library.dot(total, a, b)
    assert got[:5].tolist() == [1.75, 0, 0, 0, 0]
    assert got[5:7].isnan().all()
    assert got[7] == 2.0**-126


def test_a_product_of_tiles_sums_even_and_odd_products_apart_and_takes_tiny_numbers_for_zero(library: Library) -> None:
    total, a, b = torch.zeros(16, 16), torch.zeros(16, 32, dtype=BF16), torch.ones(16, 16, 2, dtype=BF16)
    a[0], total[0] = 2, 3
    a[1, 0], a[1, 2:4] = 2.0**24, 1  # 2^24 + 1 rounds to 2^24; the odd product is added afterwards, and lost as well
    a[2, 1], a[2, 3:6:2] = 2.0**24, -(2.0**23)  # these are all odd: 2^24 - 2^24
    a[3], b[:, 3] = 1e-40, 1e30  # below 2^-126
    total[4] = 1e-40
    a[5, 0], a[6, 1] = torch.inf, torch.nan
    got = library.multiply_tiles(total, a, b)
    assert (got[0, torch.arange(16) != 3] == 67).all()
    assert (got[1, :3] == 2.0**24).all()
    assert not got[2, :3].any()
    assert not got[3:5].any()
    assert (got[5] == torch.inf).all()
    assert got[6].isnan().all()


# rows: within a vector, a group and beyond it; a vocabulary below, at and above a split; odd and even widths
SHAPES = [
    (1, 31, 7),
    (3, 8193, 40),
    (67, 2500, 65),
    (17, 300, 576),
    (2, 12289, 1),
    (2, 300, 2),
    (40, 512, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_level_is_as_exact_as_float32_can_be(
    shape: tuple[int, int, int], level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    """Above all the mean of W's rows: with weights in one bfloat16 it would be ten times as far off as is allowed."""
    given = arguments(inputs, shape, dtype)
    log_sum, mean, mean_bias, answers = level(*given)
    wanted = exact(given)
    torch.testing.assert_close(log_sum, wanted[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mean.double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_bias, wanted[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers.double(), wanted[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [2, 8, 50])
def test_a_softmax_over_few_columns_is_as_exact(
    vocab: int, level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    """Errors of its weights do not average out here."""
    hidden, weight = inputs.normal(500, 32, dtype=dtype), inputs.normal(vocab, 32, dtype=dtype, scale=3 / 32**0.5)
    given = (hidden, weight, None, None, None, False, 1.0, 1 << 24)
    wanted = exact(given)
    for chosen in (level, cpu.linear_softmax):
        log_sum, mean = chosen(*given)[:2]
        assert (log_sum - wanted[0]).abs().mean() < 5e-7
        torch.testing.assert_close(mean.double(), wanted[1], rtol=2e-6, atol=2e-6)


def test_the_cases_of_verification_pass(
    level: EmulatedLevel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors at most twice those of plain PyTorch in the same dtype, beside rounding; a bias, offsets, a soft-cap."""
    calls = []

    def counted(*given: Any) -> tuple[Tensor, ...]:
        calls.append(given)
        return level(*given)

    monkeypatch.setattr(cpu, "linear_softmax", counted)
    small = itertools.islice(CASES["linear_softmax"](CaseInputs(1, dtype), 4), 6)  # the last one is large
    for case in small:
        assert check(case, "cpu", torch.device("cpu")) <= 1, case.name
    assert len(calls) >= 12


def test_a_level_gives_the_same_bits_for_every_number_of_threads_and_every_bound_on_memory(
    level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    given = arguments(inputs, (70, 9001, 25), dtype)
    results = []
    for threads, chunk_bytes in ((1, 1 << 24), (2, 1 << 24), (3, 1), (2, 64 * 2 * 40 * 4)):
        torch.set_num_threads(threads)
        results.append(level(*given[:-1], chunk_bytes))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("width", [24, 25, 64])
def test_a_row_has_the_same_bits_alone_and_beside_others(
    width: int, level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    """And whatever stands beside it: also beside infinite and undefined numbers."""
    hidden, weight, bias, correct, wrong, *rest = arguments(inputs, (70, 1000, width), dtype)
    hidden[1], hidden[5] = torch.inf, torch.nan
    together = level(hidden, weight, bias, correct, wrong, *rest)
    for row in (0, 2, 17, 63, 64, 69):
        one = slice(row, row + 1)
        alone = level(hidden[one], weight, bias, correct[one], wrong[one], *rest)
        assert same(alone, tuple(values[one] for values in together)), row


@pytest.mark.parametrize("width", [8, 33, 64])
def test_a_level_reads_rows_with_any_stride_and_nothing_beside_them(
    width: int, level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    """The rows lie in wider ones that hold NaN elsewhere, from an odd address on."""
    hidden, weight, *rest = arguments(inputs, (9, 300, width), dtype)
    placed = []
    for tensor in (hidden, weight):
        wide = torch.full((len(tensor), width + 6), torch.nan, dtype=dtype)
        wide[:, 1 : width + 1] = tensor
        placed.append(wide[:, 1 : width + 1])
    assert same(level(*placed, *rest), level(hidden, weight, *rest))


def test_hidden_states_of_no_width_have_equal_logits(level: EmulatedLevel, dtype: torch.dtype) -> None:
    log_sum, mean, *_ = level(
        torch.zeros(2, 0, dtype=dtype), torch.zeros(5, 0, dtype=dtype), None, None, None, False, 1.0, 1
    )
    torch.testing.assert_close(log_sum, torch.full((2,), 5.0, dtype=torch.float64).log())
    assert mean.shape == (2, 0)


def test_columns_that_are_masked_or_excluded_take_no_part(
    level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs
) -> None:
    hidden, weight, bias, correct, wrong, *rest = arguments(inputs, (5, 700, 12), dtype)
    bias[100:650] = -torch.inf
    correct[:], wrong[:] = 3, 690
    given = (hidden, weight, bias, correct, wrong, *rest)
    got, wanted = level(*given), exact(given)
    for one, other in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    bias[:3], bias[4:] = -torch.inf, -torch.inf  # nothing but the excluded answer is left
    log_sum, mean, mean_bias, _ = level(*given)
    assert (log_sum == -torch.inf).all()
    assert not mean.any()
    assert not mean_bias.any()


def test_a_level_writes_nothing_outside_the_outputs(level: EmulatedLevel, dtype: torch.dtype, inputs: Inputs) -> None:
    given = arguments(inputs, (5, 500, 33), dtype)
    expected = level(*given)
    guarded = [torch.full((t.numel() + 128,), 7.0, dtype=t.dtype) for t in expected]
    level(*given, into=tuple(g[64 : 64 + t.numel()] for g, t in zip(guarded, expected, strict=True)))
    for whole, wanted in zip(guarded, expected, strict=True):
        assert torch.equal(whole[64:-64].view(wanted.shape), wanted)
        assert (whole[:64] == 7).all()
        assert (whole[-64:] == 7).all()


def test_the_compiled_level_holds_its_sums_in_registers(tmp_path: Path) -> None:
    """Its inner loop is 24 VDPBF16PS, 12 broadcasts of weights and 2 loads, and reads no stack."""
    if not emulated_levels.CSRC.is_dir() or not emulated_levels.gcc_version().startswith("12."):
        pytest.skip("needs the source tree and GCC 12, whose register allocation this is about")
    source, target = emulated_levels.CSRC / "cpu" / "avx512_bf16.cpp", tmp_path / "level.s"
    flags = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", *emulated_levels.AVX512_BF16)
    subprocess.run([*emulated_levels.compiler(), *flags, "-S", str(source), "-o", str(target)], check=True)
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


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emulated_tiles_give_the_bits_of_the_processor(
    shape: tuple[int, int, int], dtype: torch.dtype, library: Library, inputs: Inputs
) -> None:
    if "avx512_amx" not in _C.levels():
        pytest.skip("this processor has no AMX")
    given, before = arguments(inputs, shape, dtype), _C.level()
    _C.set_level("avx512_amx")
    try:
        real = cpu.linear_softmax(*given)
    finally:
        _C.set_level(before)
    assert same(EmulatedLevel(library, tiles=True)(*given), real)


def test_products_of_pytorch_and_those_by_tiles_leave_each_other_alone(inputs: Inputs) -> None:
    """PyTorch's products by AMX share the thread and its tile registers with these."""
    if "avx512_amx" not in _C.levels():
        pytest.skip("this processor has no AMX")
    given, before = arguments(inputs, (40, 3000, 96), BF16), _C.level()
    pairs = [
        (inputs.normal(m, k, dtype=BF16), inputs.normal(k, n, dtype=BF16))
        for m, k, n in ((64, 576, 1536), (17, 100, 33), (1, 2048, 512))
    ]
    products = [a @ b for a, b in pairs]
    _C.set_level("avx512_amx")
    try:
        expected = cpu.linear_softmax(*given)
        for _ in range(5):
            for (a, b), product in zip(pairs, products, strict=True):
                assert torch.equal(a @ b, product)
                assert same(cpu.linear_softmax(*given), expected)
                assert torch.equal(a @ b, product)
    finally:
        _C.set_level(before)


@pytest.mark.skipif("ACTSCALE_CPU_LEVEL" in os.environ, reason="a level is forced")
def test_a_level_of_the_processor_that_needs_a_verdict_is_not_in_use_without_one() -> None:
    assert _C.level() not in _C.levels_by_verdict()
    assert set(_C.levels_by_verdict()) <= set(_C.levels())
    assert set(_C.build_record()["dropped_levels"]) <= {"avx512_bf16", "avx512_amx"}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_kernel_that_a_verdict_chooses_is_as_exact(
    dtype: torch.dtype, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without such a level it is the one in use."""
    monkeypatch.setattr(sys.modules["actscale_fast.ops.cpu.linear_softmax"], "by_verdict", lambda dtype: True)
    given = arguments(inputs, (67, 2500, 65), dtype)
    for got, wanted in zip(cpu.linear_softmax(*given), exact(given), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
