"""What is special to the C++ extension: instruction levels, thread counts, shared threads, memory it must not touch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actscale_fast.ops import reference

_C = pytest.importorskip("actscale_fast.ops._C", reason="the C++ extension was not built", exc_type=ModuleNotFoundError)
cpu = pytest.importorskip("actscale_fast.ops.cpu")
TYPES = pytest.importorskip("actscale_fast.ops.calls").TYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LEVELS = _C.levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = _C.level(), torch.get_num_threads()
    yield
    _C.set_level(level)
    torch.set_num_threads(threads)


def rows(n: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, vocab, generator=generator) * 3).to(dtype)
    r = (z.float() + torch.randn(n, vocab, generator=generator) / 2).to(dtype)
    correct = torch.randint(0, vocab, (n,), generator=generator)
    wrong = (correct + 1 + torch.randint(0, vocab - 1, (n,), generator=generator)) % vocab
    return z, r, correct, wrong, torch.where(correct % 2 == 0, 1.0, -1.0)


def loss(z: Tensor, r: Tensor, *answers: Tensor, reverse: bool = False, exclude: bool = True) -> tuple[Tensor, ...]:
    return cpu.intervention_loss(z, r, *answers, None, 1.0, 1.0, exclude, reverse, True)[:4]


def heads(shape: tuple[int, ...], groups: int, positions: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    n_rows, _, n_heads, width = shape
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    alpha = torch.randn(groups, positions, n_heads, generator=generator)
    shift = torch.randn(groups, positions, n_heads, width, generator=generator)
    return x, dy, alpha, shift, torch.randn(n_rows, generator=generator), torch.arange(n_rows) % groups


@pytest.mark.parametrize("level", LEVELS)
def test_powers_of_two_are_within_one_and_a_half_ulp_and_vanish_at_minus_infinity(level: str) -> None:
    _C.set_level(level)
    x = torch.cat([torch.linspace(-126, 126, 1 << 20), -torch.logspace(-30, 2, 1 << 18)])
    y = torch.empty_like(x)
    _C.powers_of_two(x.data_ptr(), y.data_ptr(), x.numel())
    exact = x.double().exp2()
    ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    assert ((y.double() - exact).abs() / ulp).max() <= 1.5
    edge = torch.tensor(
        [0.0, -0.0, -150.0, -1e4, -3e38, -torch.inf, 128.0, 129.0, 200.0, 1e9, 1.9e36, torch.inf, torch.nan]
    )
    out = torch.empty_like(edge)
    _C.powers_of_two(edge.data_ptr(), out.data_ptr(), edge.numel())
    assert out[:2].tolist() == [1, 1]
    assert out[2:6].tolist() == [0] * 4
    assert out[6:12].tolist() == [torch.inf] * 6
    assert out[12].isnan()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.7])
@pytest.mark.parametrize("first", [-1e9, torch.finfo(torch.float32).min, -150.0, 3.0])
def test_logits_far_above_the_first_ones_of_a_row_are_not_lost(
    level: str, reverse: bool, temperature: float, first: float
) -> None:
    """The kernel relates a block's powers to the largest of its first logits, and has to notice where that is wrong."""
    _C.set_level(level)
    z, r, *_ = rows(3, 5000, torch.float32)
    z[:, :64], r[:, :64] = first, first
    r[1, 2000] = z[1, 3000] = 200.0
    inverse = 1 / temperature
    _, got, gradient, _, _, _ = cpu.intervention_loss(z, r, None, None, None, None, 0.0, inverse, False, reverse, True)
    wide = z.double().requires_grad_()
    exact = reference.intervention_loss(
        wide, r.double(), None, None, None, inverse_temperature=inverse, reverse=reverse
    )[1]
    torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=1e-9 + 2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [31, 2049, 50257])
def test_levels_agree_on_the_loss(vocab: int, dtype: torch.dtype) -> None:
    arguments = rows(3, vocab, dtype)
    step = torch.finfo(dtype).eps
    for reverse in (False, True):
        _C.set_level(LEVELS[0])
        expected = loss(*arguments, reverse=reverse)
        for level in LEVELS[1:]:
            _C.set_level(level)
            for got, wanted in zip(loss(*arguments, reverse=reverse), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=max(step, 1e-5), atol=2e-6)


def capped(z: Tensor, r: Tensor, weight: Tensor, softcap: float, reverse: bool) -> tuple[Tensor, ...]:
    return cpu.intervention_loss(z, r, None, None, None, None, 0.0, 0.7, False, reverse, True, weight, softcap)[1:3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [31, 2049, 50257])
def test_levels_agree_on_the_loss_of_capped_logits(vocab: int, dtype: torch.dtype) -> None:
    z, r, *_ = rows(3, vocab, dtype)
    weight = torch.tensor([1.0, -0.5, 3.0])
    step = torch.finfo(dtype).eps
    for reverse in (False, True):
        _C.set_level(LEVELS[0])
        expected = capped(z, r, weight, 4.0, reverse)
        for level in LEVELS[1:]:
            _C.set_level(level)
            for got, wanted in zip(capped(z, r, weight, 4.0, reverse), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=max(step, 1e-5), atol=2e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n", "vocab"), [(1, 50257), (3, 20011), (64, 2049)])
def test_weighted_and_capped_losses_have_the_same_bits_for_every_number_of_threads(
    n: int, vocab: int, level: str
) -> None:
    _C.set_level(level)
    z, r, *_ = rows(n, vocab, torch.float32)
    weight = torch.arange(n) % 3 - 1.0
    for reverse in (False, True):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(capped(z, r, weight, 4.0, reverse))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [3, 40], ids=["rows split", "rows whole"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_row_of_weight_zero_is_not_read(n: int, softcap: float, level: str) -> None:
    """Its logits would lie where no memory is."""
    _C.set_level(level)
    z, r, *_ = rows(1, 20011, torch.float32)
    weight, losses, grad = torch.zeros(n), torch.empty(2, n), torch.empty(n, 20011)
    weight[0] = 2.0
    answers = torch.empty(n, 3)
    for stored in (True, False):
        _C.intervention_loss(
            type=TYPES[torch.float32], rows=n, vocab=20011, logits=z, logits_stride=1 << 44, reference=r,
            reference_stride=1 << 44, correct=None, wrong=None, direction=None, row_weight=weight, margin=0.0,
            inverse_temperature=1.0, softcap=softcap, exclude_answers=False, reverse=False, effectiveness=losses[0],
            faithfulness=losses[1], grad=grad if stored else None, answer_grad=answers if stored else None, threads=2,
        )  # fmt: skip
        assert losses[1, 0] > 0
        assert not losses[1, 1:].any()
    assert grad[0].any()
    assert not grad[1:].any()
    assert not answers.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 31, 64, 96, 128])
def test_levels_agree_on_scaled_heads(width: int, dtype: torch.dtype) -> None:
    x, dy, alpha, shift, strength, group = heads((5, 7, 3, width), 2, 7, dtype)
    results = []
    for level in LEVELS:
        _C.set_level(level)
        y = cpu.scale_heads(x, alpha, shift, 0.5, strength, group)
        gradients = cpu.scale_heads_backward(dy, x, alpha, shift, 0.5, strength, group, True, True, True)
        results.append((y, *gradients))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 31, 64, 96, 128])
def test_levels_agree_on_dynamically_scaled_heads(width: int, dtype: torch.dtype) -> None:
    x, dy, bias, weight, strength, group = heads((5, 7, 3, width), 2, 1, dtype)
    weight, d_scalars, results = weight[:, 0] / width**0.5, bias.expand(2, 7, 3)[group], []
    for level in LEVELS:
        _C.set_level(level)
        y, scalars = cpu.dynamic_scale(x, weight, bias, 0.5, strength, group)
        gradients = cpu.dynamic_scale_backward(
            dy, d_scalars, x, weight, scalars, 0.5, strength, group, True, True, True
        )
        results.append((y, scalars, *gradients))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("n", "vocab"), [(1, 50257), (2, 50257), (3, 20011), (64, 2049)])
def test_loss_has_the_same_bits_for_every_number_of_threads(n: int, vocab: int, level: str) -> None:
    _C.set_level(level)
    arguments = rows(n, vocab, torch.float32)
    for reverse in (False, True):
        for exclude in (False, True):
            torch.set_num_threads(1)
            alone = loss(*arguments, reverse=reverse, exclude=exclude)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                together = loss(*arguments, reverse=reverse, exclude=exclude)
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("groups", "positions"), [(1, 1), (3, 1), (16, 1), (1, 18), (3, 18)])
def test_head_sums_have_the_same_bits_for_every_number_of_threads(groups: int, positions: int, level: str) -> None:
    _C.set_level(level)
    x, dy, alpha, shift, strength, group = heads((16, 18, 9, 64), groups, positions, torch.float32)
    for one_position in (alpha[:, :1].contiguous(), alpha):  # also: α for all positions beside a shift for each
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.scale_heads_backward(dy, x, one_position, shift, 1.0, strength, group, True, True, True))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_large_batch(dtype: torch.dtype, level: str) -> None:
    """Alone a row is split over threads and stored as usual; in a large batch its gradient bypasses the cache."""
    _C.set_level(level)
    arguments = rows(44, 50257, dtype)
    together = loss(*arguments)
    for row in (0, 1, 22, 43):
        alone = loss(*(values[row : row + 1] for values in arguments))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("answers", [(0, 1), (2047, 2048), (2048, 4095), (4098, 0)])
def test_answers_at_the_edges_of_blocks_are_left_out_of_the_divergence(answers: tuple[int, int], level: str) -> None:
    _C.set_level(level)
    z, r, correct, wrong, direction = rows(1, 4099, torch.float32)
    correct[0], wrong[0] = answers
    _, divergence, grad, _ = loss(z, r, correct, wrong, direction)
    kept = torch.ones(4099, dtype=torch.bool)
    kept[list(answers)] = False
    log_q, log_p = (v[0, kept].double().log_softmax(0) for v in (z, r))
    torch.testing.assert_close(divergence[0].double(), (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[0, kept].double(), log_q.exp() - log_p.exp(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_outputs_is_written(dtype: torch.dtype) -> None:
    vocab = 1001
    z, r, correct, wrong, direction = rows(3, vocab, dtype)
    guarded = torch.full((3 * vocab + 2 * 64,), 7.0, dtype=dtype)
    grad, losses, answer_grad = guarded[63 : 63 + 3 * vocab], torch.empty(2, 3), torch.empty(3, 3)
    _C.intervention_loss(
        type=TYPES[dtype], rows=3, vocab=vocab, logits=z, logits_stride=vocab, reference=r, reference_stride=vocab,
        correct=correct, wrong=wrong, direction=direction, margin=1.0, inverse_temperature=1.0, exclude_answers=True,
        reverse=False, effectiveness=losses[0], faithfulness=losses[1], grad=grad, answer_grad=answer_grad, threads=2,
    )  # fmt: skip
    assert (guarded[:63] == 7).all()
    assert (guarded[63 + 3 * vocab :] == 7).all()
    assert torch.equal(grad.view(3, vocab), loss(z, r, correct, wrong, direction)[2])


def test_a_bad_token_id_is_refused_before_anything_is_written() -> None:
    z, r, correct, wrong, direction = rows(4, 50, torch.float32)
    with pytest.raises(ValueError, match=r"correct: row 2 has token id 50, expected 0 to 49"):
        loss(z, r, torch.tensor([0, 1, 50, 3]), wrong, direction)
    with pytest.raises(ValueError, match=r"wrong: row 0 has token id -1, expected 0 to 49"):
        loss(z, r, correct, torch.full((4,), -1), direction)
    with pytest.raises(ValueError, match=r"wrong: row 1 has token id 9, the same as correct"):
        loss(z, r, torch.tensor([0, 9, 2, 3]), torch.tensor([1, 9, 4, 5]), direction)
    with pytest.raises(ValueError, match=r"direction: row 3 is 0.5"):
        loss(z, r, correct, wrong, torch.tensor([1, -1, 1, 0.5]))
    with pytest.raises(ValueError, match=r"group: row 1 has group 2, expected 0 to 1"):
        cpu.scale_heads(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1), None, 1.0, None, torch.tensor([0, 2]))


def test_a_call_with_a_missing_or_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="missing argument type"):
        _C.scale_channels(rows=0)
    with pytest.raises(TypeError, match="unexpected argument colour"):
        _C.scale_channels(type=0, rows=0, width=0, x=0, x_stride=0, out=0, weight=0, threads=1, colour=0)


@pytest.mark.parametrize(
    ("name", "value"), [("rows", "2"), ("width", None), ("x", "abc"), ("x_stride", [1, 2, 3]), ("x_stride", (4, 4))]
)
def test_an_argument_of_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    given: dict[str, Any] = {
        "type": 0, "rows": 0, "positions": 1, "heads": 1, "width": 1, "x": 0, "x_stride": (1, 1, 1), "out": 0,
        "out_stride": (1, 1, 1), "alpha": 0, "shift": None, "groups": 1, "alpha_positions": 1, "shift_positions": 1,
        "strength": 1.0, "row_strength": None, "group": None, "threads": 1,
    }  # fmt: skip
    _C.scale_heads(**given)
    with pytest.raises(TypeError, match=f"^{name}: "):
        _C.scale_heads(**{**given, name: value})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_kernels_run_on_torchs_own_threads() -> None:
    program = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from actscale_fast.ops import cpu\n"
        "x = torch.randn(64, 64, 16, 64); (x * 2).sum(); before = len(os.listdir('/proc/self/task'))\n"
        "cpu.scale_heads(x, torch.ones(1, 1, 16), None, 1.0, None, None)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    assert _run(program).stdout.strip() == "0"


def test_the_interpreters_lock_is_released_while_a_kernel_runs() -> None:
    count, stop = [0], threading.Event()

    def counting() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # gives the lock back at once

    arguments = {name: torch.zeros(1 << 20) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}
    arguments |= {
        "step": torch.zeros(()),
        "count": 1 << 20,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "l1": 0.0,
    }
    thread = threading.Thread(target=counting)
    interval, progress = sys.getswitchinterval(), 0
    thread.start()
    try:
        sys.setswitchinterval(60.0)  # nobody is asked to hand the lock over: only a release lets the other thread run
        for _ in range(50):
            before = count[0]
            _C.proximal_adam_(**arguments)
            progress += count[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert progress > 0


def test_a_level_is_forced_by_the_environment_and_an_unknown_one_refused() -> None:
    program = "from actscale_fast.ops import cpu; from actscale_fast.ops import _C; print(_C.level())"
    assert _run(program, ACTSCALE_CPU_LEVEL="portable").stdout.strip() == "portable"
    failed = _run(program, ACTSCALE_CPU_LEVEL="sse9")
    assert failed.returncode != 0
    assert "ACTSCALE_CPU_LEVEL: got 'sse9', expected one that this processor has: portable" in failed.stderr


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment, "PYTHONPATH": str(Path(cpu.__file__).parents[3])}
    return subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_of_a_kept_block_is_written(dtype: torch.dtype) -> None:
    z, r, *answers = rows(16, 50257, dtype)  # large enough to lie in a kept block, which is not poisoned
    expected = loss(z, r, *answers)[2].clone()
    poison = loss(torch.full_like(z, torch.nan), r, *answers)[2]
    address = poison.data_ptr()
    assert poison.isnan().float().mean() > 0.99
    del poison
    again = loss(z, r, *answers)[2]
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def test_a_gradient_that_is_held_is_never_written_again_and_a_dropped_one_makes_room() -> None:
    logits, reference = torch.randn(2, 8, 50_000).unbind(0)  # 1.6 MB: large enough to lie in a kept block
    rows = (None, None, None, None, 0.0, 1.0, False, False, True)
    first = cpu.intervention_loss(logits, reference, *rows)[2]
    copy, address = first.clone(), first.data_ptr()
    second = cpu.intervention_loss(logits * 2, reference, *rows)[2]
    assert second.data_ptr() != address
    assert torch.equal(first, copy)
    view = first[3:5]
    del first
    third = cpu.intervention_loss(logits * 3, reference, *rows)[2]
    assert third.data_ptr() != address
    assert torch.equal(view, copy[3:5])
    del view
    assert cpu.intervention_loss(logits, reference, *rows)[2].data_ptr() == address
    assert torch.equal(cpu.intervention_loss(logits, reference, *rows)[2], copy)
