"""What tells one model from another: every weight of it, however it is stored, and nothing that is put upon it."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts, run
from model_zoo import randomised, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.architectures.weights_digest import weights_digest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_and_persistent_buffer_counts(family: str) -> None:
    model = tiny_model(family)
    model.register_buffer("kept", torch.zeros(3))
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    digest = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == digest
    for name, tensor in [*model.named_parameters(), ("kept", model.kept)]:
        with torch.no_grad():
            value = tensor.view(-1)[-1].clone()
            tensor.view(-1)[-1] = value + 1e-3
            assert weights_digest(model) != digest, name
            tensor.view(-1)[-1] = value
    assert weights_digest(model) == digest
    model.passing += 1
    assert weights_digest(model) == digest


@pytest.mark.parametrize("width", [512, 513, 4096])
def test_samples_of_a_large_weight_reach_all_its_rows_and_columns(width: int) -> None:
    model = nn.Linear(width, 512, bias=False)
    model.config = None  # type: ignore[assignment]
    digest = weights_digest(model)
    for part in (model.weight[:, : width // 16], model.weight[: 512 // 16], model.weight[-512 // 16 :]):
        before = part.detach().clone()
        with torch.no_grad():
            part.add_(1.0)
            assert weights_digest(model) != digest
            part.copy_(before)
    assert weights_digest(model) == digest


def test_dtypes_shapes_and_names_count() -> None:
    model = tiny_model("llama")
    digests = {weights_digest(model), weights_digest(copy.deepcopy(model).bfloat16())}
    zeros = [nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Sequential(nn.Linear(6, 4, bias=False))]
    for module in zeros:
        nn.init.zeros_(next(module.parameters()))
        digests.add(weights_digest(module))
    assert len(digests) == 5


def test_layouts_in_memory_do_not_count() -> None:
    module = nn.Linear(300, 200)
    digest = weights_digest(module)
    module.weight.data = module.weight.data.t().contiguous().t()
    assert not module.weight.is_contiguous()
    assert weights_digest(module) == digest


def test_patches_compilation_and_adapters_do_not_change_a_model() -> None:
    model = tiny_model("llama")
    digest = weights_digest(model)
    with af.patch(model, randomised(af.ActivScalar.for_model(model))):
        assert weights_digest(model) == digest
        assert weights_digest(torch.compile(model)) == digest
    adapted = af.get_actscale_model(model)
    assert weights_digest(adapted.model) == digest
    adapted.unload()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert weights_digest(model) == digest


def test_the_weights_of_a_peft_adapter_count() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    digest = weights_digest(adapted)
    assert weights_digest(adapted.get_base_model()) == digest
    with torch.no_grad():
        next(value for name, value in adapted.named_parameters() if "lora_B" in name).add_(1.0)
    assert weights_digest(adapted) != digest


class Packed(nn.Parameter):
    """Like bitsandbytes' Params4bit: packed bytes, with a state beside them."""

    quant_state: Any


class State:
    def __init__(self, nested: bool = True) -> None:
        self.absmax, self.code, self.offset = torch.ones(4), torch.arange(16.0), torch.tensor(0.5)
        self.state2 = State(False) if nested else None


def four_bit() -> nn.Module:
    module = nn.Linear(8, 8, bias=False)
    weight = torch.arange(32, dtype=torch.uint8).view(32, 1)
    module.weight = Packed(weight, requires_grad=False)
    module.weight.quant_state = State()
    return module


def eight_bit(*, used: bool = False) -> nn.Module:
    """Like Linear8bitLt, whose first pass moves the scales from the weight to the module."""
    module = nn.Linear(8, 8, bias=False)
    module.weight = Packed(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    module.weight.SCB = None if used else torch.arange(8.0)  # type: ignore[attr-defined]
    module.state = type("State", (), {"SCB": torch.arange(8.0) if used else None})()
    return module


def half_quadratic() -> nn.Module:
    """Like hqq's linear layer: packed values, and a dict of their scales and zeros."""
    module = nn.Module()
    module.W_q = nn.Parameter(torch.arange(32, dtype=torch.uint8), requires_grad=False)
    module.__dict__["meta"] = {"scale": torch.ones(4), "zero": torch.zeros(4), "nbits": 4, "shape": (8, 8)}
    return module


class Quantised(Tensor):
    """Like torchao's and quanto's: a tensor made of several, without values of its own."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale)
        raise NotImplementedError(f"{func} of a Quantised")


def of_several() -> nn.Module:
    module = nn.Linear(8, 8, bias=False)
    module.weight = nn.Parameter(Quantised(torch.ones(8, 8, dtype=torch.int8), torch.ones(8)), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (four_bit, [lambda m: m.weight, lambda m: m.weight.quant_state.absmax, lambda m: m.weight.quant_state.offset,
                    lambda m: m.weight.quant_state.state2.absmax]),
        (eight_bit, [lambda m: m.weight, lambda m: m.weight.SCB]),
        (half_quadratic, [lambda m: m.W_q, lambda m: m.meta["scale"], lambda m: m.meta["zero"]]),
        (of_several, [lambda m: m.weight.data_, lambda m: m.weight.scale]),
    ],
    ids=["4 bits", "8 bits", "half-quadratic", "tensors of several"],
)  # fmt: skip
def test_quantised_weights_count_with_their_scales(make: Any, parts: list[Any]) -> None:
    digest = weights_digest(nn.Sequential(make()))
    assert weights_digest(nn.Sequential(make())) == digest
    for part in parts:
        module = make()
        tensor = part(module)
        with torch.no_grad():
            tensor.view(-1)[-1:].add_(1)
        assert weights_digest(nn.Sequential(module)) != digest


def test_a_forward_pass_of_quantised_weights_does_not_change_the_model() -> None:
    assert weights_digest(eight_bit(used=True)) == weights_digest(eight_bit())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_are(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, other = tiny.llama(), tiny.llama(seed=1)
    digests = [weights_digest(model) for model in (plain, other)]
    for model, digest in zip((plain, other), digests, strict=True):
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path / digest), execution_device=torch.device("cpu"))
        assert any(value.is_meta for value in model.parameters())
        assert weights_digest(model) == digest


def test_weights_that_cannot_be_read_are_an_error_where_something_is_kept(tmp_path: Path) -> None:
    model = tiny.llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    for option in ({"checkpoint": tmp_path / "fit.safetensors"},):
        with pytest.raises(ValueError, match=r"model: lm_head\.weight is on the meta device"):
            run(model, conflicts(4), intervention=af.ActivScalar.for_model(model), **option)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="model: weight is a Unreadable, whose values cannot be read"):
        weights_digest(unreadable())


class Unreadable(Tensor):
    @staticmethod
    def __new__(cls) -> Unreadable:
        return Tensor._make_wrapper_subclass(cls, (8, 8), dtype=torch.bfloat16)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls()
        raise NotImplementedError(f"{func} of an Unreadable")


def unreadable() -> nn.Module:
    module = nn.Linear(8, 8, bias=False)
    module.weight = nn.Parameter(Unreadable(), requires_grad=False)
    return module


def test_a_fit_without_a_checkpoint_does_not_ask_for_the_models_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast.learning import identity

    monkeypatch.setattr(identity, "weights_digest", None)
    run(tiny.llama(), conflicts(4), steps=1)


def test_sharded_weights_have_the_digest_of_the_whole_model_where_all_processes_ask() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny.llama()
    whole = weights_digest(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = nn.Parameter(sharded, requires_grad=False)
        assert weights_digest(model, collective=True) == whole
        with pytest.raises(ValueError, match="model: its weights are sharded over processes"):
            weights_digest(model)
    finally:
        torch.distributed.destroy_process_group()


def test_the_digest_of_a_model_of_135_million_parameters_takes_a_moment() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    seconds = []
    for _ in range(5):
        begun = time.process_time()  # others may use the machine
        weights_digest(model)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.05
