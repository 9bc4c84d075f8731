"""What the op tests share: the parametrisation over backend x dtype x shape, random inputs, and derived tolerances.

The float64 formulas here are written apart from `actscale_fast.ops.reference` (answers are cut out of the row instead
of masked), so that a slip in one shows in the other. Run in float32 the same formulas are the eager PyTorch that the
tolerance is derived from.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    name: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter runs it: correct and slow."""
        return self.name == "triton" and self.device.type == "cpu"

    @property
    def exp_error(self) -> float:
        """ulp by which a term of a softmax may be off: a kernel's exp by 2, of the term and again of its normaliser."""
        return 1.0 if self.name == "reference" else 4.0

    def truncates(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds: a whole ulp instead of a half."""
        return self.interpreted and dtype == torch.bfloat16 and "ptx.plugin" not in sys.modules  # real PTX rounds

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 values in `dtype`, as this backend rounds."""
        if self.truncates(dtype):
            values = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
        return values.to(dtype)


def over(
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shapes: Sequence[object] = (None,),
    native_shapes: Sequence[object] = (),
    backends: Sequence[str] = BACKENDS,
) -> pytest.MarkDecorator:
    """Parametrise over backend x dtype x shape; only the arguments that vary are passed to the test.

    native_shapes are too large for Triton's interpreter and run on the other backends (on Triton where a GPU is).
    """
    names = ["backend"] + ["dtype"] * (len(dtypes) > 1) + ["shape"] * (len(shapes) + len(native_shapes) > 1)
    slow = {"triton"} if not torch.cuda.is_available() else set()
    parameters = []
    for backend in backends:
        for dtype in dtypes:
            for shape in (*shapes, *(() if backend in slow else native_shapes)):
                values = {"backend": backend, "dtype": dtype, "shape": shape}
                identity = "-".join(str(values[name]).replace("torch.", "").replace(" ", "") for name in names)
                parameters.append(pytest.param(*(values[name] for name in names), id=identity))
    return pytest.mark.parametrize(names, parameters, indirect=["backend"])


class Rows(NamedTuple):
    """The arguments of a loss over N rows of logits."""

    logits: Tensor  # [N, V]
    reference: Tensor  # [N, V]
    correct: Tensor  # [N] int64
    wrong: Tensor  # [N] int64
    direction: Tensor  # [N] of ±1, float32

    def to(self, device: torch.device) -> Rows:
        return Rows(*(value.to(device) for value in self))


@dataclass
class Inputs:
    """Random tensors from one seeded generator; made on the CPU so that every device gets the same ones."""

    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def signs(self, length: int) -> Tensor:
        """±1, both present where length > 1."""
        return 1.0 - 2.0 * ((torch.arange(length) + int(self.integers(2, 1))) % 2).float()

    def rows(self, n_rows: int, width: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Rows:
        """Logits as an intervention leaves them: the reference's, moved by about as much as they spread."""
        reference = self.normal(n_rows, width, scale=scale)
        logits = (reference + self.normal(n_rows, width, scale=scale / 2)).to(dtype)
        correct = self.integers(width, n_rows)
        wrong = (correct + 1 + self.integers(max(width - 1, 1), n_rows)) % width
        return Rows(logits, reference.to(dtype), correct, wrong, self.signs(n_rows))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at the magnitude of `values` (float64)."""
    info = torch.finfo(dtype)
    exponent = values.abs().clamp(min=info.smallest_normal).log2().floor()
    return torch.exp2(exponent) * info.eps


#: Float32 roundings, half an ulp each, on the way of a term: maximum subtracted, sum, logarithm, its subtraction,
#: exponential, difference, upstream, and the sum over the row.
ROUNDINGS = 8


def assert_as_exact_as_eager(
    name: str,
    got: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    condition: Tensor | float = 0.0,
    scaled_by: Tensor | None = None,
    truncated: bool = False,
) -> None:
    """|got − exact| ≤ 2·max|eager − exact| + 4·ulp32(condition) + ulp(exact) (+ half an ulp before a scaling).

    Args:
        got: the result, of its own dtype.
        exact: the float64 result for the same inputs.
        eager: the float32 result of plain PyTorch for the same inputs, before any rounding to a narrower dtype.
        condition: the size of the terms whose sum or difference the result is. A sum in another order, or a term
            rounded on its way (`ROUNDINGS`), moves the result by half ulps at this size, which a lucky eager run does
            not show.
        scaled_by: the factor that a result already rounded to its dtype was multiplied with (a gradient stored for an
            upstream of 1): its half ulp is scaled along.
        truncated: the backend cuts off where it should round (`Backend.truncates`): that half ulp is a whole one.
    """
    value, exact, eager = got.detach().double().cpu(), exact.detach().double().cpu(), eager.detach().double().cpu()
    assert value.shape == exact.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(value[~finite].nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)), (
        f"{name}: not finite alike"
    )
    eager_error = (eager - exact)[finite].abs().nan_to_num(nan=0.0, posinf=0.0)
    bound = 2 * (eager_error.max() if eager_error.numel() else 0.0)
    size = torch.as_tensor(condition, dtype=torch.float64).expand_as(exact)
    bound = bound + ROUNDINGS / 2 * ulp(size, torch.float32)
    bound = bound + ulp(exact.nan_to_num(), got.dtype)
    if scaled_by is not None:
        factor = scaled_by.detach().double().cpu().abs()
        before = torch.where(factor > 0, exact.nan_to_num() / factor, 0.0)
        bound = bound + factor * ulp(before, got.dtype) / (1 if truncated else 2)
    excess = torch.where(finite, (value - exact).abs() - bound, -torch.ones_like(exact))
    bad = ~(excess <= 0)
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(where)}: got {float(value[where])}, exact {float(exact[where])}, allowed error "
            f"{float(bound[where]):.3g}, error {float((value - exact)[where].abs()):.3g}; {int(bad.sum())} such"
        )


class Losses(NamedTuple):
    effectiveness: Tensor  # [N]
    faithfulness: Tensor  # [N]
    gradient: Tensor  # [N, V], of Σ d_effectiveness·effectiveness + Σ d_faithfulness·faithfulness
    value_condition: Tensor  # [N], Σ of the magnitudes that faithfulness is a difference of
    gradient_condition: Tensor  # [N, V]


def textbook_losses(
    rows: Rows,
    upstream: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    *,
    margin: float = 1.0,
    temperature: float = 1.0,
    exclude_answers: bool = True,
    kl: str = "forward",
    answers: bool = True,
) -> Losses:
    """The two losses and their gradient, one row at a time, by the definitions, computed in `dtype` on the CPU."""
    z = rows.logits.detach().cpu().to(dtype).requires_grad_()
    r = rows.reference.detach().cpu().to(dtype)
    width = z.shape[1]
    effectiveness, faithfulness = [], []
    value_condition, gradient_condition = [], torch.zeros(z.shape, dtype=torch.float64)
    for n, (c, w) in enumerate(zip(rows.correct.tolist(), rows.wrong.tolist(), strict=True)):
        hinge = z.new_zeros(())
        if answers:
            hinge = (margin - float(rows.direction[n]) * (z[n, c] - z[n, w])).relu()  # gradient 0 at the kink
        effectiveness.append(hinge)
        cuts = [-1, *sorted((c, w)), width] if answers and exclude_answers else [-1, width]
        pieces = [slice(a + 1, b) for a, b in itertools.pairwise(cuts)]
        log_q, log_p = (torch.cat([t[n, piece] for piece in pieces]).div(temperature).log_softmax(0) for t in (z, r))
        weight, other = (log_p, log_q) if kl == "forward" else (log_q, log_p)
        there = weight > -torch.inf
        if not there.all():
            weight, other = weight[there], other[there]
        faithfulness.append((weight.exp() * (weight - other)).sum())
        p, q, low_p, low_q = (t.detach().double() for t in (log_p.exp(), log_q.exp(), log_p, log_q))
        size = low_p.abs().nan_to_num(posinf=0.0) + low_q.abs().nan_to_num(posinf=0.0)
        # a log-probability is (z − max) − log Σ, and Σ ≥ 1 is rounded at 1 however close to 0 its logarithm is
        value_condition.append(((p if kl == "forward" else q) * (1 + size)).sum())
        spread = (p + q) * (1 + size) if kl == "forward" else q * (1 + size) * (1 + size + value_condition[-1])
        spread = spread / temperature * float(upstream[1][n].abs())
        for piece, values in zip(pieces, spread.split([len(z[n, piece]) for piece in pieces]), strict=True):
            gradient_condition[n, piece] = values
        if answers:
            gradient_condition[n, [c, w]] += float(upstream[0][n].abs())
    e = torch.stack(effectiveness) if effectiveness else z.new_zeros(0)
    f = torch.stack(faithfulness) if faithfulness else z.new_zeros(0)
    total = (e * upstream[0].cpu().to(dtype)).sum() + (f * upstream[1].cpu().to(dtype)).sum()
    (gradient,) = torch.autograd.grad(total, z, allow_unused=True, materialize_grads=True)
    condition = torch.stack(value_condition) if value_condition else torch.zeros(0, dtype=torch.float64)
    return Losses(e.detach(), f.detach(), gradient, condition, gradient_condition)


def textbook_scale(
    x: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    strength: float | Tensor,
    group: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor | None]]:
    """y in `dtype` on the CPU, and the float leaves (x, alpha, shift) it came from; one row of the batch at a time."""
    leaves = [None if t is None else t.detach().cpu().to(dtype).requires_grad_() for t in (x, alpha, shift)]
    x_leaf, a, v = leaves
    assert x_leaf is not None
    beta = torch.as_tensor(strength, dtype=dtype).cpu().expand(x.shape[0])
    rows = []
    for b in range(x.shape[0]):
        groups = next(t.shape[0] for t in (a, v) if t is not None)
        g = int(group[b]) if group is not None else (0 if groups == 1 else b)
        y = x_leaf[b]
        if a is not None:
            y = y * (1 + beta[b] * a[g]).unsqueeze(-1)
        if v is not None:
            y = y + beta[b] * v[g]
        rows.append(y)
    return torch.stack(rows), leaves


def error_of(call: Callable[[], object], kind: type[Exception]) -> str:
    """The message of the exception that `call` raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)
