"""CPU regressions and call overhead under pytest-benchmark.

    pytest benchmarks/test_regression.py --benchmark-autosave           # keep a run
    pytest benchmarks/test_regression.py --benchmark-compare            # against the last one kept
    pytest benchmarks/test_regression.py --benchmark-disable            # each once, no timing: the smoke test

The work is that of the harness's own cases, so that both tell of the same thing; each result is checked before it is
timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from actscale_fast import ops
from actscale_fast.ops import backends
from actscale_fast.verification.accuracy import accuracy
from benchmarks.case import Problem, Variant
from benchmarks.cases import dynamic_scale, kl_div, linear, linear_kl, loss, overhead, proximal, scale_heads

pytest.importorskip("pytest_benchmark")

CPU = torch.device("cpu")
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "loss-float32": lambda: loss.make(16, 49152, torch.float32, True, CPU),
    "loss-float32-upstream-by-row": lambda: loss.make(16, 49152, torch.float32, False, CPU),
    "loss-bfloat16": lambda: loss.make(16, 49152, torch.bfloat16, True, CPU),
    "linear-float32": lambda: linear.make(16, 192, 16384, torch.float32, CPU),
    "linear-bfloat16": lambda: linear.make(16, 192, 16384, torch.bfloat16, CPU),
    "kl-div-float32": lambda: kl_div.make(16, 49152, torch.float32, CPU),
    "kl-div-mean-of-half-float32": lambda: kl_div.make(
        16, 49152, torch.float32, CPU, kl_div.Form(True, 2.0, half=True)
    ),
    "kl-div-softcap-float32": lambda: kl_div.make(16, 49152, torch.float32, CPU, kl_div.Form(softcap=30.0)),
    "linear-kl-float32": lambda: linear_kl.make(32, 192, 128, 16384, torch.float32, True, True, CPU),
    "scale-heads-float32": lambda: scale_heads.make((64, 18, 9, 64), torch.float32, "forward + backward", CPU),
    "scale-heads-bfloat16": lambda: scale_heads.make((64, 18, 9, 64), torch.bfloat16, "forward + backward", CPU),
    "dynamic-scale-float32": lambda: dynamic_scale.make((64, 18, 9, 64), torch.float32, "forward + backward", CPU),
    "dynamic-scale-bfloat16": lambda: dynamic_scale.make((64, 18, 9, 64), torch.bfloat16, "forward + backward", CPU),
    "proximal": lambda: proximal.make((30, 1, 9), CPU),
    "overhead-scale-heads": lambda: overhead.scaling("forward", 1.0, CPU),
    "overhead-scale-heads-gradient": lambda: overhead.scaling("forward + backward", None, CPU),
    "overhead-loss": lambda: overhead.short_loss(CPU),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_cpu_kernels(name: str, benchmark: Any) -> None:
    reason = backends.unavailable("cpu")
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    problem = PROBLEMS[name]()
    variants: dict[str, Variant] = {variant.name: variant for variant in problem.variants}
    ours = variants["actscale_fast cpu"]
    baseline = tuple(result.clone() for result in problem.variants[0].call())
    with ops.use_backend("cpu"):
        found = accuracy(ours.call(), problem.exact(), [baseline], problem.terms() if problem.terms else None)
        assert not found.reason
        benchmark(ours.call)
