"""Cases of the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import ops
from ..case import Case, Inputs


def proximal_adam(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Numbers of parameters, first and later steps, with and without the ℓ1 norm."""

    def case(name: str, count: int, steps: float, l1: float, offset: int = 0) -> Case:
        tensors = [inputs.normal(count) for _ in range(3)]
        arguments = (*tensors, inputs.normal(count).abs(), torch.tensor(steps), l1)
        return Case(name, _step, arguments, offset=offset)

    yield case("one value", 1, 0.0, 0.1)
    yield case("the first step", 270, 0.0, 0.0)
    yield case("a later step", 271, 99.0, 0.3)
    yield case("unaligned", 100, 3.0, 0.3, offset=1)
    yield case("many values", 100_003, 5.0, 1e-3)
    yield case("no values", 0, 0.0, 0.1)


def _step(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, l1: float
) -> tuple[Tensor, ...]:
    state = [value.clone() for value in (parameter, exp_avg, exp_avg_sq, step.float())]
    ops.proximal_adam_(state[0], gradient, *state[1:], lr=0.05, l1=l1)
    return tuple(state)
