"""Layers that are computed again in the backward pass: the same gradients, and next to nothing kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from engine_cases import PROMPTS, TokenExamples
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.engine.microbatches import RequestedPrompt
from actscale_fast.learning.engine.token_budget import KeptBytes
from actscale_fast.learning.execution import Execution

OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)
KINDS: dict[str, Any] = {"scalar": af.ActivScalar, "vector": af.SteerVec, "dynamic": af.DynScalar}


def steps(model: Any, data: Any, intervention: Any, objective: af.Objective = OBJECTIVE, **options: Any) -> list[Any]:
    """Terms and gradients of two steps on different prompts, and whether layers were computed again."""
    found: list[Any] = []
    with torch.enable_grad(), Engine(model, data, intervention, [objective], Execution(**options)) as opened:
        for rows in ([0, 1, 2, 3], [2, 0]):
            terms, gradients = opened.gradients([FitRequest(rows, objective)])
            found += [terms.clone(), *gradients]
        found.append(opened.runner.recomputation.is_on)
    return found


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize(
    "where", [{}, {"positions": [-2, -1]}, {"site": "residual", "layers": [0]}, {"layers": [1]}], ids=str
)
def test_gradients_are_the_same_bits(family: str, where: dict[str, Any]) -> None:
    model = tiny_model(family)
    intervention = randomised(af.ActivScalar.for_model(model, **where), 1, 0.3)
    expected = steps(model, TokenExamples(), intervention, recompute=False)
    found = steps(model, TokenExamples(), intervention, recompute=True)
    assert (found[-1], expected[-1]) == (True, False)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_sees_the_context_of_the_pass_that_is_repeated(kind: str) -> None:
    model, data = tiny_model(), TokenExamples([*PROMPTS, [7] * 12])
    where = {} if kind == "dynamic" else {"positions": [0, -1]}
    parts = [randomised(KINDS[kind].for_model(model, **where), 1, 0.3)]
    parts.append(randomised(af.ActivScalar.for_model(model, site="mlp_out", layers=[1]), 2, 0.3))
    for intervention in (parts[0], parts[0] + parts[1]):
        expected = steps(model, data, intervention, recompute=False)
        assert_same_bits(steps(model, data, intervention, recompute=True), expected)


def test_a_norm_of_produced_scalars_and_long_answers() -> None:
    import tiny
    from fit_cases import conflicts

    model = tiny.llama()
    ends = [af.Example(one.prompt, one.correct + " one two", one.wrong) for one in conflicts(4)]
    cases: list[tuple[Any, Any]] = [
        (conflicts(4), af.Objective(sparsity="scalars", minimality=0.1)),
        (ends, OBJECTIVE),
    ]
    for examples, objective in cases:
        values = []
        for recompute in (False, True):
            probes = randomised(af.DynScalar.for_model(model), 3, 0.1)
            options: dict[str, Any] = {"steps": 2, "lr": 0.05, "recompute": recompute, "progress": False}
            af.fit(model, tiny.tokenizer(), examples, probes, objective, **options)
            values.append(probes.probes.detach())
        assert torch.equal(*values)


def test_rows_with_strengths_and_groups_of_their_own() -> None:
    model, data = tiny_model(), TokenExamples()
    stack = af.stack([randomised(af.ActivScalar.for_model(model, positions=[-1, 0]), seed, 0.3) for seed in (1, 2)])
    one_way = af.Objective(margin=1.0, faithfulness=0.2, directions=(1,))
    requests = [FitRequest([0, 2, 3], OBJECTIVE, 0), FitRequest([1, 2], one_way, 1)]
    found = []
    for recompute in (False, True):
        with torch.enable_grad(), Engine(model, data, stack, [OBJECTIVE, one_way], Execution(recompute=recompute)) as e:
            terms, gradients = e.gradients(requests)
        found.append([terms, *gradients, recompute])
    assert_same_bits(found[1], found[0])


def kept_bytes(opened: Engine, row: int, known: list[Tensor]) -> tuple[int, int]:
    """(bytes that autograd keeps after a forward pass on one prompt, those of weights among them)."""
    runner = opened.runner
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    model_storages = {value.untyped_storage().data_ptr() for value in known if not value.is_meta}
    rows = [runner.planner.unpacked(RequestedPrompt(0, row))]
    microbatch = runner.collator.collate(rows, [FitRequest([row], OBJECTIVE)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = runner.forward_backward.losses(microbatch)[1]
    weights = {key: size for key, size in storages.items() if key in model_storages}
    del loss
    return sum(storages.values()) - sum(weights.values()), sum(weights.values())


@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights_are_not_kept_and_layers_are_computed_again_by_themselves(
    disk: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = steps(tiny_model(), TokenExamples(), randomised(af.ActivScalar.for_model(tiny_model()), 1, 0.3))
    model = tiny_model()
    largest = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    if disk:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    intervention, kept = randomised(af.ActivScalar.for_model(model), 1, 0.3), {}
    with caplog.at_level(logging.INFO, "actscale_fast"):
        found = steps(model, TokenExamples(), intervention)
    assert found[-1]
    assert [record.message for record in caplog.records if "offloaded" in record.message] == [
        "recompute: layers are offloaded, and their weights would be kept with the activations; each layer is computed "
        "again in the backward pass"
    ]
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
    for recompute in (False, True):
        execution = Execution(recompute=recompute)
        with torch.enable_grad(), Engine(model, TokenExamples(), intervention, [OBJECTIVE], execution) as opened:
            kept[recompute], _ = kept_bytes(opened, 2, [])
    assert kept[False] > len(model.model.layers) * largest  # the weights of all layers, beside the activations
    assert kept[True] < largest


def test_a_pass_keeps_a_hidden_state_per_layer() -> None:
    model, data = tiny_model(num_hidden_layers=6), TokenExamples([[5, 9] * 40, [3, 4]])
    intervention = randomised(af.ActivScalar.for_model(model), 1, 0.3)
    kept = {}
    for recompute in (False, True):
        execution = Execution(recompute=recompute)
        with torch.enable_grad(), Engine(model, data, intervention, [OBJECTIVE], execution) as opened:
            kept[recompute], _ = kept_bytes(opened, 0, [*model.parameters(), *model.buffers()])
    hidden = 2 * 80 * model.config.hidden_size * 4  # both directions
    assert kept[True] < 6 * hidden + 3 * hidden < kept[False] / 4


def test_by_itself_where_one_prompt_would_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_model(), TokenExamples()
    intervention = randomised(af.ActivScalar.for_model(model), 1, 0.3)
    expected = steps(model, data, intervention, memory_bytes=1, recompute=False)
    with caplog.at_level(logging.INFO, "actscale_fast"):
        found = steps(model, data, intervention, memory_bytes=1)
    assert (found[-1], expected[-1]) == (True, False)
    assert_same_bits(found, expected)
    assert sum("a prompt of 24 tokens in all directions would take about" in one.message for one in caplog.records) == 1
    assert not steps(model, data, intervention)[-1]


def test_after_an_out_of_memory_in_a_pass_of_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model(), TokenExamples()
    intervention = randomised(af.ActivScalar.for_model(model), 1, 0.3)
    with torch.enable_grad(), Engine(model, data, intervention, [OBJECTIVE]) as opened:
        expected = opened.gradients([FitRequest([2], OBJECTIVE)])
        compute, runner = opened.runner.compute, opened.runner

        def without_memory(inputs: Any) -> Any:
            if not runner.recomputation.is_on:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(inputs)

        monkeypatch.setattr(runner, "compute", without_memory)
        terms, gradients = opened.gradients([FitRequest([2], OBJECTIVE)])
        assert torch.equal(terms, expected[0])
        assert torch.equal(gradients[0], expected[1][0])
    refusing = Execution(recompute=False)
    with torch.enable_grad(), Engine(model, data, intervention, [OBJECTIVE], refusing) as opened:
        runner = opened.runner
        monkeypatch.setattr(runner, "compute", without_memory)
        with pytest.raises(torch.OutOfMemoryError):
            opened.gradients([FitRequest([2], OBJECTIVE)])


def test_what_is_counted_is_what_is_kept() -> None:
    model, data = tiny_model(), TokenExamples([[5, 9] * 20, [3, 4]])
    with torch.enable_grad(), Engine(model, data, af.ActivScalar.for_model(model), [OBJECTIVE]) as opened:
        runner = opened.runner
        request = [FitRequest([0], OBJECTIVE)]
        inputs = runner.collator.collate([runner.planner.unpacked(RequestedPrompt(0, 0))], request)
        counted = []
        for wrap in (None, "layers"):
            kept = KeptBytes([model])
            runner.section.wrap_layer = kept.layer if wrap else None
            with kept:
                runner.forward_backward.losses(inputs)
            counted.append((kept.n_bytes, len(kept.layers)))
            assert (kept.n_bytes_recomputed < kept.n_bytes) is bool(wrap)
        runner.section.wrap_layer = None
    assert counted == [(counted[0][0], 0), (counted[0][0], len(model.model.layers))]


def test_bad_values_and_what_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="recompute: got 'yes', expected True, False or 'auto'"):
        Execution(recompute="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recompute: got True with capture=True"):
        Execution(recompute=True, capture=True)
    model = tiny_model()
    compiled: Any = torch.compile(model, backend="eager")
    for wanted, message in ((True, "recompute: got True for a compiled model"), ("auto", None)):
        execution = Execution(recompute=wanted, memory_bytes=1)  # type: ignore[arg-type]
        opened = Engine(compiled, TokenExamples(), af.ActivScalar.for_model(model), [OBJECTIVE], execution)
        if message is None:
            with torch.enable_grad(), opened:
                assert not opened.runner.recomputation.is_on
            continue
        with pytest.raises(ValueError, match=message), torch.enable_grad(), opened:
            pass
