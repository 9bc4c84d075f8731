"""A pass reads tensors alone: nothing in it waits for the device, and a graph of it can be replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import actscale_fast as af
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.engine import Engine, FitRequest, cuda_graphs
from actscale_fast.learning.engine.cuda_graphs import CudaGraphs, ProbedGraphs, tensors_of, with_tensors
from actscale_fast.learning.engine.forward_backward import ForwardBackward, MicrobatchInputs
from actscale_fast.learning.engine.microbatches import RequestedPrompt

OBJECTIVES = [af.Objective(), af.Objective(margin=1.0, faithfulness=0.3)]
PLACES: list[dict[str, Any]] = [{}, {"positions": [-1]}, {"layers": [1, 2]}, {"positions": [-2], "layers": [2]}]


def open_engine(place: dict[str, Any], groups: int | None) -> tuple[Engine, list[FitRequest]]:
    model = tiny.llama()
    intervention: Any = af.ActivScalar.for_model(model, **place)
    with torch.no_grad():
        intervention.alpha.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    if groups:
        intervention = af.ActivScalar.stack([intervention] * groups)
    engine = Engine(model, EncodedExamples(conflicts(6), tiny.tokenizer(), model), intervention, OBJECTIVES)
    requests = [FitRequest([0, 1, 2], OBJECTIVES[0])]
    return engine, requests + ([FitRequest([3, 4], OBJECTIVES[1], 2)] if groups else [])


def one_pass(engine: Engine, requests: list[FitRequest], shift: int = 0) -> MicrobatchInputs:
    prompts = [RequestedPrompt(i, row + shift) for i, request in enumerate(requests) for row in request.rows]
    (rows,) = engine.runner.planner.microbatches(prompts, requests)
    return engine.runner.collator.collate(rows, requests)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_pass_never_reads_a_value_on_the_host(place: dict[str, Any], groups: int | None) -> None:
    """Fake tensors have no values: reading one, which on a GPU would wait for it, raises."""
    engine, requests = open_engine(place, groups)
    with engine:
        inputs = one_pass(engine, requests)
        expected = engine.runner.forward_backward.compute(inputs)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = with_tensors(inputs, [mode.from_tensor(tensor) for tensor in tensors_of(inputs)])
        with mode:
            with pytest.raises(DataDependentOutputException):
                fakes.tensors["sign"].sum().item()
            found = engine.runner.forward_backward.compute(fakes)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]


def test_inputs_can_be_taken_apart_and_put_together() -> None:
    engine, requests = open_engine({"positions": [-1], "layers": [1]}, 3)
    with engine:
        inputs = one_pass(engine, requests)
        again = with_tensors(inputs, [tensor.clone() for tensor in tensors_of(inputs)])
        assert again.shape == inputs.shape
        for found, expected in zip(
            engine.runner.forward_backward.compute(again), engine.runner.forward_backward.compute(inputs), strict=True
        ):
            assert torch.equal(found, expected)


@dataclasses.dataclass
class Replay:
    """Stands for a CUDA graph: computes again from the memory of its inputs, into the memory of its outputs."""

    forward_backward: ForwardBackward
    inputs: MicrobatchInputs
    outputs: list[Tensor]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for there, value in zip(self.outputs, self.forward_backward.compute(self.inputs), strict=True):
            there.copy_(value)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Graphs without a GPU."""
    made: list[Replay] = []

    def captured(self: CudaGraphs, inputs: MicrobatchInputs) -> Any:
        own = with_tensors(inputs, [torch.full_like(tensor, 0) for tensor in tensors_of(inputs)])
        outputs = [torch.full_like(tensor, torch.nan) for tensor in self.forward_backward.compute(inputs)]
        made.append(Replay(self.forward_backward, own, outputs))
        return cuda_graphs._Graph(made[-1], tensors_of(own), outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(CudaGraphs, "_captured", captured)
    return made


def test_a_graph_is_made_once_a_shape_and_reads_each_pass_anew(replayed: list[Replay]) -> None:
    engine, requests = open_engine({"layers": [1, 2]}, 3)
    with engine:
        graphs = CudaGraphs(engine.runner.forward_backward)
        for shift in (0, 1, 0):
            inputs = one_pass(engine, requests, shift)
            for found, expected in zip(
                graphs.compute(inputs), engine.runner.forward_backward.compute(inputs), strict=True
            ):
                assert torch.equal(found, expected)
        shapes = {one_pass(engine, requests, shift).tensors["ids"].shape for shift in (0, 1)}
    assert len(replayed) == len(shapes)
    assert sum(graph.replays for graph in replayed) == 3


def test_prompts_of_a_captured_step_have_few_widths() -> None:
    data = EncodedExamples(conflicts(9), tiny.tokenizer(), tiny.llama())
    widths = {data.batch([row], 4).input_ids.shape[1] for row in range(9)}
    longest = max(map(len, data.prompts))
    assert widths <= {4, 8, longest}
    for row in range(9):
        padded, plain = data.batch([row], 4), data.batch([row])
        assert padded.attention_mask.sum() == plain.attention_mask.sum()
        assert padded.padded == (padded.input_ids.shape[1] > plain.input_ids.shape[1])


def test_capture_needs_one_gpu() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="capture: got a model on cpu, expected one on one GPU"):
        af.fit(model, tiny.tokenizer(), conflicts(3), af.ActivScalar.for_model(model), capture=True, progress=False)


def test_probed_graphs_are_used_once_three_passes_agree(replayed: list[Replay]) -> None:
    engine, requests = open_engine({"layers": [1, 2]}, 3)
    with engine:
        plain = engine.runner.forward_backward
        graphs = ProbedGraphs(plain)
        computed = count_calls(plain)
        for shift in (0, 1, 0, 0):
            expected = [tensor.clone() for tensor in plain.compute(one_pass(engine, requests, shift))]
            before = len(computed)
            for found, right in zip(graphs.compute(one_pass(engine, requests, shift)), expected, strict=True):
                assert torch.equal(found, right)
    assert len(computed) - before == 1  # the replay's own; nothing is compared any more
    assert (sum(graphs.agreed.values()) >= 3, graphs.given_up) == (True, False)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda outputs: outputs[0].mul_(1.01), "a captured pass gives other results"),
        (lambda outputs: outputs[1].fill_(torch.nan), "a captured pass gives other results"),
        (lambda outputs: _fail("operation not permitted when stream is capturing"), "operation not permitted when"),
    ],
)
def test_probed_graphs_that_disagree_or_fail_are_given_up_with_a_warning(
    replayed: list[Replay], monkeypatch: pytest.MonkeyPatch, fault: Any, reason: str
) -> None:
    replay = Replay.replay
    monkeypatch.setattr(Replay, "replay", lambda self: (replay(self), fault(self.outputs)))
    engine, requests = open_engine({"layers": [1, 2]}, 3)
    with engine:
        graphs = ProbedGraphs(engine.runner.forward_backward)
        inputs = one_pass(engine, requests, 0)
        expected = engine.runner.forward_backward.compute(inputs)
        with pytest.warns(RuntimeWarning, match=f"capture='auto': passes are not captured as CUDA graphs .{reason}"):
            first = graphs.compute(inputs)
        for found in (first, graphs.compute(inputs)):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert graphs.given_up


def _fail(message: str) -> None:
    raise RuntimeError(message)


def count_calls(plain: Any) -> list[int]:
    """Notes each call of `compute`."""
    calls: list[int] = []
    compute = plain.compute
    plain.compute = lambda inputs: calls.append(0) or compute(inputs)
    return calls


def test_capture_auto_on_a_cpu_runs_plain_passes() -> None:
    alphas = []
    for capture in (False, "auto"):
        model = tiny.llama()
        scalars = af.ActivScalar.for_model(model)
        af.fit(model, tiny.tokenizer(), conflicts(3), scalars, steps=3, capture=capture, progress=False)
        alphas.append(scalars.alpha.detach().clone())
    assert torch.equal(*alphas)


def test_another_value_of_capture_is_refused() -> None:
    with pytest.raises(ValueError, match="capture: got 'yes', expected True, False or 'auto'"):
        af.Execution(capture="yes")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_fit_is_the_plain_one() -> None:
    results = []
    for captured in (False, True):
        model = tiny.llama().cuda()
        scalars = af.ActivScalar.for_model(model)
        af.fit(
            model, tiny.tokenizer(), conflicts(9), scalars, steps=8, batch_size=4, capture=captured, progress=False
        )  # fmt: skip
        results.append(scalars.alpha.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
