"""What `plan_memory` predicts from a config, beside what a step holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import actscale_fast as af
from actscale_fast.cli.app import main
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.execution import Execution
from benchmarks.memory import peak_bytes
from benchmarks.models import RandomPrompts, Shape, random_model

SHAPE = Shape(4, 2, 64, 1024, torch.float32, kv_heads=2, inner=352)
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def folder_of(config: dict[str, Any], path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("recompute", [False, True])
def test_the_prediction_is_near_the_measured_peak(recompute: bool) -> None:
    device = torch.device("cpu")
    model, data = random_model(SHAPE, device), RandomPrompts(2, 600, SHAPE.vocab, device)
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.uniform_(-0.1, 0.1)

    def step() -> Any:
        execution = Execution(recompute=recompute)
        with torch.enable_grad(), Engine(model, data, scalars, [af.Objective()], execution) as engine:
            return engine.gradients([FitRequest([0, 1], af.Objective())])

    before = model.config.to_dict(), model.config._attn_implementation
    plan = af.plan_memory(model.config, 600, batch_size=2, n_examples=2)
    use = plan.use(recompute)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert use.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert use.total - use.weights == pytest.approx(peak_bytes(step, device), rel=0.15)


def test_an_8b_model_from_its_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(LLAMA_8B | {"num_hidden_layers": 4}, tmp_path)
    command = ["plan", "--model", str(folder), "--tokens", "4096", "--memory", "8", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    plain, again = found["uses"]
    outside = 2 * 128256 * 4096 * 2 + 4096 * 2
    assert plain["weights"] == again["weights"] == outside + 4 * 218112000 * 2
    hidden = 2 * 4096 * 4096 * 2  # both directions, in bfloat16
    assert 4 * hidden < again["kept"] < 10 * hidden
    assert 130_000 < plain["kept"] / (2 * 4096) / 4 < 150_000  # bytes of a token and layer
    assert "recompute=True" in found["advice"][0]
    assert main([*command[:-1], "--memory", "200"]) == 0
    assert "it fits in 200 GB without recomputation" in capsys.readouterr().out.replace("\n", " ")


def test_processes_share_weights_and_activations() -> None:
    model = random_model(SHAPE, torch.device("cpu"))
    whole, by_heads, by_shards = (
        af.plan_memory(model.config, 64, **options) for options in ({}, {"tp": 2}, {"fsdp": 2})
    )
    layers = sum(p.numel() * 4 for p in model.model.layers.parameters())
    assert whole.use(False).weights - layers * 0.5 > by_heads.use(False).weights > layers * 0.5
    assert by_heads.use(False).kept < 0.75 * whole.use(False).kept
    assert by_shards.use(False).kept == whole.use(False).kept


def test_layers_and_passes_change_what_is_kept() -> None:
    config = random_model(SHAPE, torch.device("cpu")).config
    whole = af.plan_memory(config, 64, batch_size=4).use(False)
    upper = af.plan_memory(config, 64, batch_size=4, layers=[2, 3]).use(False)
    together = af.plan_memory(config, 64, batch_size=4, accumulate=1).use(False)
    assert upper.kept < 0.6 * whole.kept
    assert upper.references > whole.references
    assert together.kept == pytest.approx(4 * whole.kept, rel=0.05)


def test_kept_logits_are_counted_and_divided_heads_need_none() -> None:
    config = random_model(SHAPE, torch.device("cpu")).config
    whole, by_heads, by_shards = (
        af.plan_memory(config, 8, n_examples=100, **options).use(False) for options in ({}, {"tp": 2}, {"fsdp": 2})
    )
    assert by_heads.references == whole.references
    assert by_shards.references >= 100 * config.vocab_size * 4
    capped = transformers.Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    assert af.plan_memory(capped, 8, n_examples=100).use(False).references >= 100 * 97 * 4


def test_the_advice_follows_the_share_of_free_memory_that_a_pass_may_take() -> None:
    config = random_model(SHAPE, torch.device("cpu")).config
    plain = af.plan_memory(config, 1024, batch_size=1).use(False)
    enough, tight = (
        af.plan_memory(config, 1024, batch_size=1, memory_gb=size / 1e9).advice[0]
        for size in (4 * plain.total, 1.01 * plain.total)
    )
    assert "without recomputation" in enough
    assert "'auto' sets recompute=True" in tight
    assert "memory_bytes=" in tight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: got 0"),
        ({"tp": 3}, "tp: got 3, which does not divide num_attention_heads=2"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected 'auto', float32, bfloat16 or float16"),
        ({"memory_gb": 0}, "memory_gb: got 0, expected a number above 0"),
        ({"site": "nowhere"}, "site: got 'nowhere', expected one of head"),
        ({"layers": [40]}, "layers: got 40"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    config = random_model(SHAPE, torch.device("cpu")).config
    with pytest.raises(ValueError, match=message):
        af.plan_memory(config, **{"tokens": 8} | options)


def test_a_model_instead_of_its_config_is_an_error() -> None:
    with pytest.raises(
        TypeError, match="model: got LlamaForCausalLM, expected a folder, a name on the hub or a config"
    ):
        af.plan_memory(random_model(SHAPE, torch.device("cpu")), 8)
