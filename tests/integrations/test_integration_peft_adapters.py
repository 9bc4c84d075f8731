"""Activation scalars as (IA)³ adapters that PEFT loads, and back: the same bits, or a reason why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import CONFIGS, IDS, logits, randomised, scalars, tiny_model
from op_cases import error_of
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.integrations import _peft_adapters
from actscale_fast.integrations.peft import accelerate, from_peft_ia3, to_peft_ia3
from actscale_fast.patching.merge import site_projection

#: GPT-2 (Conv1D), llama (two key-value heads), mistral (heads · head_dim is not the hidden size), and two families with
#: a norm behind the projections.
FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "olmo2"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def steered(model: nn.Module, intervention: af.Intervention, strength: float = 1.0) -> Tensor:
    with af.patch(model, intervention, strength=strength):
        return logits(model)


def alpha_of(intervention: Any) -> Tensor:
    return intervention.alpha.detach()


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("error:.*fan_in_fan_out.*")
@pytest.mark.filterwarnings("error:.*missing adapter keys.*")
def test_peft_runs_a_written_adapter_with_the_bits_of_a_patch(family: str, site: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    intervention, plain = scalars(model, site=site), logits(model)
    alpha_of(intervention)[0] = 2.0  # of a factor that a norm follows only the sign gets through
    expected = steered(model, intervention, -0.75)
    assert not torch.allclose(expected, plain, atol=1e-2)
    to_peft_ia3(intervention, tmp_path / "adapter", strength=-0.75, model=model)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    with accelerate(loaded) as handle:
        assert len(handle.fused) == 2
        assert torch.equal(logits(loaded), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_there_and_back_is_exact(family: str, site: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    written = scalars(model, site=site, layers=[1])
    with torch.no_grad():
        values = torch.tensor([-1.0, -2.5, 1e-9, 0.3, 7.7, -0.999, 0.0, 1e4])
        written.alpha.copy_(values[: written.alpha.numel()].view_as(written.alpha))
    to_peft_ia3(written, tmp_path / "first", model=model)
    read = from_peft_ia3(tmp_path / "first", model)
    assert isinstance(read, af.ActivScalar)
    assert read.location == written.location
    assert torch.equal(1 + alpha_of(read), 1 + alpha_of(written))  # what either multiplies with
    assert torch.equal(steered(model, read), steered(model, written))
    to_peft_ia3(read, tmp_path / "second", model=model)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_without_a_model_the_names_come_from_the_table_of_families(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    for site in ("head", "attn_out"):
        intervention = scalars(model, site=site)
        to_peft_ia3(intervention, tmp_path / "with", model=model, strength=0.5)
        to_peft_ia3(intervention, tmp_path / "without", strength=0.5)
        for name in (CONFIG, TENSORS):
            assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    message = error_of(lambda: to_peft_ia3(scalars(model, site="mlp_out"), tmp_path), ValueError)
    assert message.endswith("at the site 'mlp_out' can only be found in the model")


def test_only_the_chosen_layers_are_in_the_adapter_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=12)  # layers.1 is the end of no other name
    intervention = scalars(model, layers=[11, 1])
    to_peft_ia3(intervention, tmp_path, model=model)
    names = ["model.layers.1.self_attn.o_proj", "model.layers.11.self_attn.o_proj"]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(config["target_modules"]) == sorted(config["feedforward_modules"]) == names
    assert (config["peft_type"], config["task_type"], config["fan_in_fan_out"]) == ("IA3", "CAUSAL_LM", False)
    assert sorted(load_file(tmp_path / TENSORS)) == [f"base_model.model.{name}.ia3_l" for name in names]
    loaded = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=12), tmp_path)
    with accelerate(loaded) as handle:
        assert sorted(handle.fused) == [f"base_model.model.{name}" for name in names]
    assert torch.equal(logits(loaded), steered(model, intervention))
    read = from_peft_ia3(tmp_path, model)
    assert read.singles[0].location.layers == (1, 11)
    assert torch.equal(steered(model, read), steered(model, intervention))


def test_sites_of_different_modules_share_an_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    both = scalars(model) + 0.5 * scalars(model, seed=2, site="mlp_out")
    to_peft_ia3(both, tmp_path, model=model, strength=2.0)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), steered(model, both, 2.0))
    read = from_peft_ia3(tmp_path, model)
    assert [part.location.site for part in read.singles] == ["head", "mlp_out"]
    assert torch.equal(steered(model, read), steered(model, both, 2.0))
    twice = scalars(model) + scalars(model, seed=2)
    to_peft_ia3(twice, tmp_path, model=model)
    torch.testing.assert_close(steered(model, from_peft_ia3(tmp_path, model)), steered(model, twice))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_an_adapter_that_peft_trained_and_saved_is_read_where_it_is_tied(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    target = "attn.c_proj" if family == "gpt2" else "o_proj"
    adapted = get_peft_model(
        tiny_model(family), IA3Config(target_modules=[target], feedforward_modules=[target], task_type="CAUSAL_LM")
    )
    factors = torch.tensor([[1.5, -0.25, 0.0, 0.75], [0.3, 1.0, 2.0, 1e-3]])
    layers = [m for n, m in adapted.named_modules() if n.endswith(target)]
    width = layers[0].in_features // 4
    for layer, row in zip(layers, factors, strict=True):
        layer.ia3_l["default"].data = row.repeat_interleave(width)[None]
    adapted.save_pretrained(tmp_path)
    read = from_peft_ia3(tmp_path, model)
    torch.testing.assert_close(1 + alpha_of(read)[:, 0], factors, rtol=0, atol=3e-8)
    assert torch.equal(1 + alpha_of(read)[0, 0], factors[0])
    torch.testing.assert_close(steered(model, read), logits(adapted), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_is_not_tied_is_refused_with_the_layer_the_head_and_the_spread(tmp_path: Path) -> None:
    model = tiny_model("llama")
    to_peft_ia3(scalars(model), tmp_path / "head", model=model)
    to_peft_ia3(scalars(model, site="attn_out"), tmp_path / "site", model=model)
    for folder in ("head", "site"):
        path = tmp_path / folder / TENSORS
        tensors = load_file(path)
        vector = tensors["base_model.model.model.layers.1.self_attn.o_proj.ia3_l"].flatten()
        vector[16:24] = torch.linspace(0.5, 1.0, 8)  # head 2
        save_file(tensors, path)
    message = error_of(lambda: from_peft_ia3(tmp_path / "head", model), ValueError)
    assert message.startswith(f"{tmp_path / 'head'}: layer 1, head 2: factors from 0.5 to 1 (spread 0.5), expected one")
    message = error_of(lambda: from_peft_ia3(tmp_path / "site", model), ValueError)
    assert "layer 1, attn_out: factors from " in message
    assert "expected one factor per site" in message


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_modules_that_are_no_site_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapted = get_peft_model(tiny_model(family), IA3Config(task_type="CAUSAL_LM"))  # PEFT's own choice of modules
    adapted.save_pretrained(tmp_path)
    path, tensors = tmp_path / TENSORS, load_file(tmp_path / TENSORS)
    for module, reason in (
        (
            "attn.c_attn" if family == "gpt2" else "self_attn.k_proj",
            "neither the output projection of an attention nor",
        ),
        ("mlp.c_proj" if family == "gpt2" else "mlp.down_proj", "a feed-forward module here, so the MLP's inner width"),
    ):
        save_file({key: value for key, value in tensors.items() if module in key}, path)
        assert f".0.{module}' is {reason}" in error_of(lambda: from_peft_ia3(tmp_path, model), ValueError)


def test_what_an_adapter_cannot_say_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    broken = scalars(model)
    with torch.no_grad():
        broken.alpha[0, 0, 1] = torch.nan
    both = scalars(model) + scalars(model, site="attn_out")
    cases: list[tuple[Any, str]] = [
        (scalars(model, positions=[0, -1]), "it has positions, but an adapter acts on every token"),
        (scalars(model, site="residual"), "no linear layer produces the residual stream by itself"),
        (af.ActivScalar.stack([scalars(model), scalars(model)]), "a stack differs between rows"),
        (randomised(af.SteerVec.for_model(model)), "SteerVec is not one factor per channel"),
        (randomised(af.DynScalar.for_model(model)), "DynScalar is not one factor per channel"),
        (scalars(model) + randomised(af.SteerVec.for_model(model)), "SteerVec is not one factor per channel"),
        (both, "scales both the input (heads) and the output of 'model.layers.0.self_attn.o_proj'"),
        (broken, "alpha: 1 of 8 values are not finite"),
        (scalars(tiny_model("gpt2")), "made for another model: model_type 'gpt2'"),
    ]
    for intervention, reason in cases:
        message = error_of(lambda i=intervention: to_peft_ia3(i, tmp_path / "adapter", model=model), ValueError)
        assert reason in message
    message = error_of(lambda: to_peft_ia3(scalars(model), tmp_path / "adapter", strength=1e300), ValueError)
    assert "are not finite" in message
    for wrong in (torch.ones(3), "a"):
        with pytest.raises(TypeError, match="expected one number"):
            to_peft_ia3(scalars(model), tmp_path / "adapter", strength=wrong)  # type: ignore[arg-type]
    message = error_of(lambda: to_peft_ia3(model, tmp_path / "adapter", model=model), TypeError)
    assert message == "intervention: got LlamaForCausalLM, expected an ActivScalar"
    assert not (tmp_path / "adapter").exists()
    moe = tiny_model("mixtral")
    assert "does not end in one known projection" in error_of(
        lambda: to_peft_ia3(scalars(moe, site="mlp_out"), tmp_path / "adapter", model=moe), ValueError
    )


def test_folders_that_hold_no_plain_ia3_adapter_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    good = tmp_path / "good"
    to_peft_ia3(scalars(model), good, model=model)

    def copied(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    def refused(folder: Path, kind: type[Exception] = ValueError, on: Any = model) -> str:
        return error_of(lambda: from_peft_ia3(folder, on), kind)

    assert "not found" in refused(tmp_path / "nothing", FileNotFoundError)
    folder = copied("no tensors")
    (folder / TENSORS).unlink()
    assert "not found" in refused(folder, FileNotFoundError)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04c__builtin__\neval\n")
    assert "adapter_model.bin: a pickle, which can run code when it is opened" in refused(folder)
    folder = copied("truncated")
    (folder / TENSORS).write_bytes((good / TENSORS).read_bytes()[:-7])
    assert "not a safetensors file" in refused(folder)
    for name, content in (("json", "{"), ("list", "[1]"), ("kind", "{}")):
        folder = copied(name)
        (folder / CONFIG).write_text(content)
        assert "damaged or not an adapter's" in refused(folder)
    folder = copied("modules")
    (folder / CONFIG).write_text(json.dumps({**json.loads((good / CONFIG).read_text()), "modules_to_save": ["score"]}))
    assert "replaces whole modules (score)" in refused(folder)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["o_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "got a LORA adapter, expected IA3" in refused(tmp_path / "lora")
    folder = copied("infinite")
    save_file(
        {key: torch.full_like(value, torch.inf) for key, value in load_file(good / TENSORS).items()}, folder / TENSORS
    )
    assert "8 of 8 values are not finite" in refused(folder)
    folder = copied("strange")
    save_file({**load_file(good / TENSORS), "base_model.model.score.weight": torch.ones(2)}, folder / TENSORS)
    assert "got the tensor 'base_model.model.score.weight'" in refused(folder)
    folder = copied("empty")
    save_file({}, folder / TENSORS)
    assert "holds no (IA)³ vector" in refused(folder)
    assert "expected (1, 40): another model's" in refused(good, on=tiny_model("mistral"))


def test_a_snapshot_of_links_as_the_hub_s_cache_has_it_is_read_and_replaced(tmp_path: Path) -> None:
    model, intervention = tiny_model("llama"), scalars(tiny_model("llama"))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    to_peft_ia3(intervention, blobs, model=model)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (snapshot / name).symlink_to(blobs / name)
    before = (blobs / TENSORS).read_bytes()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), snapshot)), steered(model, intervention))
    assert torch.equal(steered(model, from_peft_ia3(snapshot, model)), steered(model, intervention))
    to_peft_ia3(-intervention, snapshot, model=model)
    assert (blobs / TENSORS).read_bytes() == before
    assert torch.equal(steered(model, from_peft_ia3(snapshot, model)), steered(model, intervention, -1.0))


def test_the_base_model_s_name_goes_along_and_the_auto_class_finds_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base").eval()
    intervention = scalars(base)
    to_peft_ia3(intervention, tmp_path / "adapter", model=base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), steered(base, intervention))


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_an_adapter_is_on_gives_the_same_names(family: str, site: str, tmp_path: Path) -> None:
    model, intervention = tiny_model(family), scalars(tiny_model(family), site=site)
    to_peft_ia3(intervention, tmp_path / "plain", model=model)
    targets = ["attn.c_proj", "mlp.c_proj"] if family == "gpt2" else ["o_proj", "down_proj"]
    lora = LoraConfig(target_modules=targets, fan_in_fan_out=family == "gpt2")
    for adapted in (PeftModel.from_pretrained(model, tmp_path / "plain"), get_peft_model(tiny_model(family), lora)):
        read = from_peft_ia3(tmp_path / "plain", adapted)
        assert read.singles[0].location == intervention.location
        assert torch.equal(1 + alpha_of(read), 1 + alpha_of(intervention))
        to_peft_ia3(intervention, tmp_path / "again", model=adapted)
        configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("plain", "again")]
        assert configs[0] == configs[1]
        assert (tmp_path / "plain" / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
def test_an_adapter_is_read_on_a_model_whose_weights_are_packed_or_elsewhere(site: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    intervention = scalars(model, site=site)
    to_peft_ia3(intervention, tmp_path, model=model)
    packed = tiny_model("llama")
    for layer in packed.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    for other in (packed, tiny_model("llama").to("meta")):
        assert torch.equal(alpha_of(from_peft_ia3(tmp_path, other)), alpha_of(from_peft_ia3(tmp_path, model)))
        to_peft_ia3(intervention, tmp_path / "again", model=other)
        assert (tmp_path / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()


def test_a_model_with_a_projection_of_another_width_is_refused_for_that_reason(tmp_path: Path) -> None:
    model = tiny_model("llama")
    to_peft_ia3(scalars(model), tmp_path, model=model)
    model.model.layers[1].self_attn.o_proj = nn.Linear(24, 32)
    message = error_of(lambda: from_peft_ia3(tmp_path, model), ValueError)
    assert "of layer 1 takes 24 inputs, expected 4 heads · 8 = 32" in message
    model.model.layers[1].self_attn.o_proj = nn.Identity()
    model.model.layers[1].self_attn.o_proj.in_features = 32
    message = error_of(lambda: to_peft_ia3(scalars(tiny_model("llama")), tmp_path, model=model), ValueError)
    assert message == "model: layer 1's projection is a Identity, expected nn.Linear or Conv1D"


def test_a_bare_base_model_and_an_adapted_one_are_taken_by_their_own_names(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    bare, intervention = whole.model, scalars(whole)
    to_peft_ia3(intervention, tmp_path, model=bare)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["task_type"] is None
    assert sorted(config["target_modules"]) == ["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"]
    with af.patch(bare, intervention), torch.no_grad():
        expected = bare(IDS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny_model("llama").model, tmp_path)(IDS)[0], expected)
    assert torch.equal(alpha_of(from_peft_ia3(tmp_path, bare)), alpha_of(from_peft_ia3(tmp_path, whole.model)))


def test_a_crash_between_the_two_files_leaves_no_adapter_rather_than_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    to_peft_ia3(scalars(model), tmp_path, model=model)

    def failing(path: Path, content: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(_peft_adapters, "write_json", failing)
    with pytest.raises(OSError, match="disk full"):
        to_peft_ia3(scalars(model, seed=2), tmp_path, model=model)
    assert [path.name for path in tmp_path.iterdir()] == [TENSORS]
    with pytest.raises(FileNotFoundError):
        from_peft_ia3(tmp_path, model)


def test_of_a_family_with_a_norm_behind_the_projection_the_site_is_that_projection() -> None:
    """So nothing stands between PEFT's module and the site, also in Gemma 2 and OLMo 2."""
    from actscale_fast.architectures.layout import layout

    for family in ("gemma2", "olmo2"):
        found = layout(tiny_model(family))
        layer = found.layers[0]
        assert site_projection(found, "attn_out", 0) is layer.self_attn.o_proj is found.site_module("attn_out", 0)
        assert site_projection(found, "mlp_out", 0) is layer.mlp.down_proj
