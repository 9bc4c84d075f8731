"""get_actscale_model: a model and its intervention as one module, and its life inside transformers' Trainer."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_zoo import IDS, randomised, tiny_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import actscale_fast as af
from actscale_fast import ActScaleConfig, ActScaleModel
from actscale_fast.integrations.trainer import ProximalCallback

KINDS = ("ActivScalar", "SteerVec", "DynScalar")


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.detach()  # type: ignore[no-any-return]


def adapted(seed: int = 1, **config: Any) -> ActScaleModel:
    model = af.get_actscale_model(tiny_model(), ActScaleConfig(**config))
    randomised(model.intervention, seed, 0.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_under_its_intervention(kind: str) -> None:
    model = adapted(kind=kind, site="head", layers=[1], strength=0.7)
    assert type(model.intervention).__name__ == kind
    assert model.intervention.location.layers == (1,)
    plain = tiny_model()
    with af.patch(plain, model.intervention, 0.7):
        expected = logits(plain)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(plain), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.strength = -0.7
    with af.patch(plain, model.intervention, -0.7):
        assert torch.equal(logits(model), logits(plain))


def test_only_the_intervention_is_trained_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model()
    model = af.get_actscale_model(base)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["intervention.alpha"]
    total = sum(p.numel() for p in base.parameters()) + 8
    model.print_trainable_parameters()
    expected = f"trainable params: 8 || all params: {total:,} || trainable%: {800 / total:.4g}\n"
    assert capsys.readouterr().out == expected
    assert model.unload() is base
    assert all(p.requires_grad for p in base.parameters())


def test_generate_config_and_devices_are_the_models() -> None:
    model = adapted()
    plain = tiny_model()
    with af.patch(plain, model.intervention):
        expected = plain.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
    assert model.config is model.get_base_model().config
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense
    values = model.intervention.alpha.detach().clone()
    model.to(torch.bfloat16)
    assert next(model.model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.intervention.alpha, values)  # fp32, no bit lost on the way
    optimizer = torch.optim.AdamW(model.intervention.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)(IDS).logits.float().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind=kind, strength=-0.5)
    model.save_pretrained(tmp_path)
    loaded = ActScaleModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.strength == -0.5
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = ActScaleModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert [name for name, p in again.named_parameters() if p.requires_grad]


def test_an_intervention_saved_by_itself_loads_too_and_a_damaged_config_does_not(tmp_path: Path) -> None:
    model = adapted()
    model.intervention.save_pretrained(tmp_path)
    assert ActScaleModel.from_pretrained(tiny_model(), tmp_path).strength == 1.0
    (tmp_path / "actscale_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"actscale_config.json: damaged or not an ActScaleModel's"):
        ActScaleModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"intervention\.json: not found"):
        ActScaleModel.from_pretrained(tiny_model(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="folder: no/such is not a folder, and is not on the hub either"):
        ActScaleModel.from_pretrained(tiny_model(), "no/such")


def test_a_merged_model_is_a_plain_checkpoint_for_stock_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(strength=0.5)
    with torch.no_grad():
        model.intervention.alpha[0, 0, 1] = -2.0  # a head that is removed
    expected, before = logits(model), {k: v.clone() for k, v in tiny_model().state_dict().items()}
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock), logits(merged))
    af.unmerge(merged)
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_steered_by_itself(how: Any) -> None:
    model = adapted(strength=0.5)
    model.intervention.train()
    copied = how(model)
    assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]
    assert torch.equal(logits(copied), logits(model))
    with torch.no_grad():
        copied.intervention.alpha.zero_()
    assert torch.equal(logits(copied), logits(tiny_model()))
    assert not torch.equal(logits(model), logits(copied))
    assert all(p.requires_grad for p in copied.unload().parameters())
    assert torch.equal(logits(how(copied)), logits(tiny_model()))  # of one that was unloaded
    with model.disable_adapter():
        assert torch.equal(logits(how(model)), logits(tiny_model()))
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(model)


def test_two_on_one_model_give_it_back_with_the_last_one() -> None:
    base = tiny_model()
    first, second = af.get_actscale_model(base), af.get_actscale_model(base)
    first.unload()
    first.unload()
    assert second.n_trainable[0] == 8
    second.unload()
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(RuntimeError, match="taken off by unload"):
        _ = second.strength


def test_wrappers_load_what_they_save() -> None:
    model, other = adapted(), af.get_actscale_model(tiny_model())
    outer, target = torch.nn.ModuleDict({"a": model}), torch.nn.ModuleDict({"a": other})
    assert list(outer.state_dict()) == ["a.intervention.alpha"]
    target.load_state_dict(outer.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_a_trainer_takes_a_quantised_base() -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    base = tiny_model()
    base.is_quantized, base.hf_quantizer = True, type("Quantizer", (), {"is_trainable": True})()
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    validate_quantization_for_training(af.get_actscale_model(base))


def test_its_state_is_the_interventions_alone() -> None:
    model, other = adapted(), af.get_actscale_model(tiny_model())
    assert list(model.state_dict()) == ["intervention.alpha"]
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .intervention\.alpha"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"intervention.alpha": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .intervention\.alpha"):
        other.load_state_dict(tiny_model().state_dict())


class _Hub:
    """Stands for the hub: keeps what is uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        return type("Url", (), {"repo_id": f"user/{repo_id}"})

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        for path in Path(folder_path).iterdir():
            (self.folder / path.name).write_bytes(path.read_bytes())
        return f"https://hub/{repo_id}/commit/1"


def test_what_is_pushed_to_the_hub_is_what_is_read_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: _Hub(tmp_path))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **given: (asked.append((repo, given)), str(tmp_path))[1]
    )
    model = adapted(strength=0.5)
    assert model.push_to_hub("scalars") == "https://hub/user/scalars/commit/1"
    assert "library_name: actscale_fast" in (tmp_path / "README.md").read_text()
    loaded = ActScaleModel.from_pretrained(tiny_model(), "user/scalars", revision="v1")
    assert asked == [("user/scalars", {"revision": "v1", "allow_patterns": ["*.safetensors", "*.json"]})]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"site": "head"}, TypeError, "config: got dict, expected an ActScaleConfig or an Intervention"),
        (ActScaleConfig(kind="Lora"), ValueError, "kind: got 'Lora', expected one of 'ActivScalar', 'SteerVec'"),
        (ActScaleConfig(layers=[7]), ValueError, "layers: got 7"),
    ],
)
def test_a_bad_config_is_refused_and_the_model_is_as_before(config: Any, error: type[Exception], message: str) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        af.get_actscale_model(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(tiny_model()))


def texts(n: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tiny.WORDS), (n, 7), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 7, "labels": row, "other": row} for row in ids]


def trained(folder: Path, minimality: float, **arguments: Any) -> tuple[ActScaleModel, Trainer]:
    model = af.get_actscale_model(tiny.llama())
    settings = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no"} | arguments
    given = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.05, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=0.0, report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
        data_seed=3, **settings,
    )  # fmt: skip
    data: Any = texts()
    trainer = Trainer(model=model, args=given, train_dataset=data, callbacks=[ProximalCallback(minimality)])  # type: ignore[arg-type]
    return model, trainer


def test_in_a_trainer_the_scalars_take_the_steps_of_proximal_adam(tmp_path: Path) -> None:
    model, trainer = trained(tmp_path, 0.2)
    batches: list[Any] = []
    inner = trainer.training_step
    trainer.training_step = lambda m, inputs, *rest: (batches.append(dict(inputs)), inner(m, inputs, *rest))[1]  # type: ignore[method-assign]
    trainer.train()
    other = tiny.llama()
    scalars = af.ActivScalar.for_model(other)
    moments = torch.zeros_like(scalars.alpha), torch.zeros_like(scalars.alpha)
    count = torch.zeros(())
    for batch in batches:
        with af.patch(other, scalars):
            loss = other(**batch).loss
        (gradient,) = torch.autograd.grad(loss, scalars.alpha)
        with torch.no_grad():
            af.ops.proximal_adam_(scalars.alpha.data, gradient, *moments, count, lr=0.05, l1=0.2)
    assert len(batches) == 6
    torch.testing.assert_close(model.intervention.alpha, scalars.alpha, rtol=1e-4, atol=1e-6)
    assert 0 < model.intervention.n_active < model.intervention.n_parameters
    assert torch.equal(model.intervention.alpha == 0, scalars.alpha == 0)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AMSGrad"])
def test_the_threshold_is_in_the_metric_of_the_optimizer(name: str) -> None:
    model = adapted()
    alpha = model.intervention.alpha
    optimizer: torch.optim.Optimizer = torch.optim.SGD([alpha], lr=0.1)
    if name != "SGD":
        optimizer = torch.optim.AdamW([alpha], lr=0.1, betas=(0.9, 0.99), eps=1e-3, amsgrad=name == "AMSGrad")
    moment = largest = torch.zeros_like(alpha)
    for step in range(1, 4):
        alpha.grad = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(step)) / step
        optimizer.step()
        moment = 0.99 * moment + 0.01 * alpha.grad**2
        largest = torch.maximum(largest, moment)
        second = largest if name == "AMSGrad" else moment
        rate = 0.1 if name == "SGD" else 0.1 / ((second / (1 - 0.99**step)).sqrt() + 1e-3)
        before = alpha.detach().double()
        expected = before.sign() * (before.abs() - 0.3 * rate).clamp(min=0)
        ProximalCallback(0.3).on_optimizer_step(*[None] * 3, model=model, optimizer=optimizer)  # type: ignore[arg-type]
        torch.testing.assert_close(alpha.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_a_trainer_holds_the_scalars_alone_and_is_resumed(tmp_path: Path) -> None:
    whole, trainer = trained(tmp_path / "whole", 0.05)
    trainer.train()
    _, first = trained(tmp_path / "parts", 0.05, max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert (checkpoint / "model.safetensors").stat().st_size < 1000
    resumed, second = trained(tmp_path / "parts", 0.05, max_steps=6)
    second.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(resumed.intervention.alpha, whole.intervention.alpha)


def test_the_callback_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minimality: got -1, expected a number that is at least 0"):
        ProximalCallback(-1)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    data: Any = texts(2)
    trainer = Trainer(model=tiny.llama(), args=arguments, train_dataset=data, callbacks=[ProximalCallback(0.1)])
    with pytest.raises(TypeError, match="model: got LlamaForCausalLM, expected the result of get_actscale_model"):
        trainer.train()
    other = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(RuntimeError, match="optimizer: has none of the intervention's parameters"):
        ProximalCallback(0.3).on_optimizer_step(*[None] * 3, model=adapted(), optimizer=other)  # type: ignore[arg-type]


def test_the_saved_config_names_the_base_model(tmp_path: Path) -> None:
    model = adapted()
    model.config._name_or_path = "user/base"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "actscale_config.json").read_text())
    assert (saved["strength"], saved["base_model_name_or_path"]) == (1.0, "user/base")
    model.strength = torch.ones(3)
    with pytest.raises(ValueError, match="strength: got one value per row"):
        model.save_pretrained(tmp_path)
