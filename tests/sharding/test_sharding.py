"""What is known of a model's weights without a second process, and the engines that are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.architectures import sharding
from actscale_fast.architectures.layout import layout
from actscale_fast.architectures.own_heads import own_heads


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    torch.distributed.destroy_process_group()


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP1's wrapper, which needs a group of processes and a GPU."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class PipelineIdentityLayer(nn.Identity):
    """Stands for what transformers puts in the place of other stages' layers."""


def partitioned(model: Any) -> Any:
    """A model as DeepSpeed's ZeRO-3 leaves it between passes."""
    weight = model.model.embed_tokens.weight
    weight.data = torch.empty(0)
    weight.ds_id = 0
    return model


def with_fsdp1_layers(model: Any) -> Any:
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0])
    return model


def with_stages(model: Any) -> Any:
    model.model.layers[0] = PipelineIdentityLayer()
    return model


REFUSED = {
    "DataParallel is not supported; use one process per device": nn.DataParallel,
    "FSDP1 .* is not supported; shard it with FSDP2": with_fsdp1_layers,
    "partitioned by DeepSpeed's ZeRO-3, which is not supported; shard it with FSDP2": partitioned,
    "pipeline stages, which hold some of the layers, are not supported; shard it with FSDP2": with_stages,
}


@pytest.mark.parametrize("message", REFUSED)
def test_engines_that_are_not_supported_are_refused_by_name(message: str) -> None:
    scalars = af.ActivScalar.for_model(tiny.llama())
    model: Any = REFUSED[message](tiny.llama())
    examples = [af.Example("The capital of A is", " Paris", " Rome")]
    for call in (
        lambda: af.patch(model, scalars),
        lambda: af.ActivScalar.for_model(model),
        lambda: af.head_mask(model, torch.ones(4)),
        lambda: af.merge(model, scalars),
        lambda: af.get_actscale_model(model, scalars),
        lambda: af.evaluate(model, tiny.tokenizer(), examples, scalars),
        lambda: af.attribution(model, tiny.tokenizer(), examples, intervention=scalars, progress=False),
        lambda: af.fit(model, tiny.tokenizer(), examples, scalars, progress=False),
        lambda: af.sweep(model, tiny.tokenizer(), examples, [{}], intervention=scalars, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_distributed_wrapper_is_refused_with_what_to_pass_instead(mesh: Any) -> None:
    model = nn.parallel.DistributedDataParallel(tiny.llama())
    with pytest.raises(ValueError, match=r"DistributedDataParallel is not supported; use the model inside it"):
        layout(model)


def test_how_a_weight_is_stored(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(torch.randn(6, 4))
    placeholder = nn.Parameter(torch.empty(0))
    placeholder.ds_id = 3  # type: ignore[attr-defined]
    kinds = {
        "plain": weight,
        "sharded": distribute_tensor(weight.detach(), mesh, [Shard(0)]),
        "meta": torch.empty(2, 2, device="meta"),
        "packed": torch.zeros(2, dtype=torch.int8),
        "partitioned": placeholder,
    }
    assert {name: sharding.stored_as(value) for name, value in kinds.items()} == {name: name for name in kinds}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sharded_weight_is_read_and_scaled_in_parts(axis: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.randn(6, 4)
    weight = distribute_tensor(whole.clone(), mesh, [Shard(axis)])
    index = torch.tensor([0, 5, 23, 7])
    assert torch.equal(sharding.sampled(weight, index), whole.flatten()[index])
    columns = torch.randn(4)
    sharding.local(weight).mul_(sharding.own_part(columns, weight))
    assert torch.equal(weight.full_tensor(), whole * columns)
    assert sharding.storages(weight) == sharding.storages(weight.to_local())


def test_a_model_that_one_process_holds_needs_no_other(mesh: Any) -> None:
    assert sharding.model_processes(tiny.llama()) is sharding.ALONE
    assert not sharding.is_sharded(tiny.llama())
    called = sharding.ALONE.from_leader(lambda: 3)
    assert (called, sharding.ALONE.all_gather(1), sharding.ALONE.leaders(2)) == (3, [1], 2)


def test_heads_that_no_plan_divides_are_an_error() -> None:
    projection = nn.Linear(32, 32)
    assert own_heads(projection, 32, 4, 8) is None
    with pytest.raises(RuntimeError, match=r"site: 'head' got 16 channels, expected 4 heads · 8 = 32"):
        own_heads(projection, 16, 4, 8)


def test_an_activation_that_is_a_distributed_tensor_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return distribute_tensor(x, mesh, [Replicate()])

    model = tiny.llama()
    model.model.layers[0].mlp = Spread()
    with pytest.raises(ValueError, match=r"an activation at the site is a DTensor"):
        af.ActivScalar.for_model(model, site="mlp_out", layers=[0])


@pytest.mark.parametrize("packs", [False, True])
def test_too_little_memory_for_a_long_prompt_among_short_ones_ends_in_recomputation(packs: bool) -> None:
    from actscale_fast.learning.encoded_examples import EncodedExamples
    from actscale_fast.learning.engine import Engine, FitRequest, step_runner
    from actscale_fast.learning.engine.microbatches import RequestedPrompt

    class TwoAlike(sharding.ModelProcesses):
        """Two processes of which the other says what this one says."""

        n_asked = 0

        def all_gather(self, value: Any) -> list[Any]:
            TwoAlike.n_asked += 1
            assert TwoAlike.n_asked < 20, "they go on asking each other"
            return [value, value]

    prompts = ["The capital of A is " * 9 + "The capital of A is", *(f"The capital of {a} is" for a in "BC"), "A is"]
    data = EncodedExamples([af.Example(text, " Paris", " Rome") for text in prompts], tiny.tokenizer(), tiny.llama())
    requests = [FitRequest(range(len(prompts)), af.Objective())]
    engine = Engine(tiny.llama(), data, af.ActivScalar.for_model(tiny.llama()), [af.Objective()])
    with torch.enable_grad(), engine, pytest.MonkeyPatch.context() as patched:
        engine.together = TwoAlike((0, 1), 0)
        engine.runner.planner.packs = packs
        patched.setattr(step_runner, "free_bytes", lambda device: 10)
        rows = [RequestedPrompt(0, row) for row in range(len(prompts))]
        with pytest.warns(UserWarning, match="too little memory is left for"):
            found = engine._agreed_microbatches(rows, requests)
    assert engine.runner.recomputation.is_on
    assert [len(rows) for rows in found] == [1] * len(prompts)
