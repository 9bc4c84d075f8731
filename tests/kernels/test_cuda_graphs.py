"""CUDA graphs of whole steps through the public ops: forward, backward and update are captured and replayed."""

from __future__ import annotations

import pytest
import torch
from op_cases import Backend, Inputs, over
from torch import Tensor

from actscale_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Step:
    """One step of learning scalars and a probe; `run` leaves its results in tensors that stay where they are."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.rows = inputs.rows(8, 12 * 64).to(device)
        self.x = inputs.normal(8, 5, 12, 64).to(device)
        self.strength = inputs.normal(8).to(device)
        self.group = inputs.integers(2, 8).to(device)
        self.alpha = inputs.normal(2, 1, 12, scale=0.1).to(device).requires_grad_()
        self.probe = inputs.normal(2, 12, 64, scale=0.1).to(device).requires_grad_()
        self.state = [torch.zeros_like(self.alpha) for _ in range(2)] + [torch.zeros((), device=device)]
        self.results: list[Tensor] = []

    def run(self) -> None:
        options = {"strength": self.strength, "group": self.group}
        hidden = ops.scale_heads(self.x, self.alpha, **options)
        hidden, scalars = ops.dynamic_scale(hidden, self.probe, **options, return_scalars=True)
        rows = self.rows
        e, f, l1 = ops.intervention_loss(
            hidden[:, -1].flatten(1), rows.reference, rows.correct, rows.wrong, direction=rows.direction,
            scalars=self.alpha,
        )  # fmt: skip
        total = e.mean() + 0.5 * f.mean() + 0.1 * l1 + 0.01 * scalars.abs().mean()
        gradients = torch.autograd.grad(total, (self.alpha, self.probe))
        ops.proximal_adam_(self.alpha, gradients[0], *self.state, lr=0.01, l1=0.1)
        self.results = [e.detach(), f.detach(), l1.detach(), scalars.detach(), *gradients]

    def everything(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.results, self.alpha, *self.state)]


@over(backends=["reference", "triton", "cuda"])
def test_a_captured_step_replays_the_bits_of_the_eager_one(backend: Backend, inputs: Inputs) -> None:
    device = torch.device("cuda")
    step = Step(inputs, device)
    start = [t.detach().clone() for t in (step.alpha, *step.state)]

    def reset() -> None:
        for tensor, value in zip((step.alpha.detach(), *step.state), start, strict=True):
            tensor.copy_(value)

    expected = []
    for _ in range(2):
        step.run()
        expected.append(step.everything())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what allocates and compiles runs before the capture
        step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    reset()
    for right in expected:
        for result in step.results:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(step.everything(), right, strict=True))
