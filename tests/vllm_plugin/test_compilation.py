"""vLLM's compilation key tells engines with and without a table, or with another table, apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import TinyLlama, save

from actscale_fast.integrations.vllm import plugin, settings
from actscale_fast.integrations.vllm.served_model import ServedModel


def configured(tiny: TinyLlama, folder: Path | None, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """The configuration of an engine that is not started."""
    from vllm.engine.arg_utils import EngineArgs

    for name in (settings.FOLDER, settings.KINDS, settings.ROWS):
        monkeypatch.delenv(name, raising=False)
    if folder is not None:
        monkeypatch.setenv(settings.FOLDER, str(folder))
        plugin.register()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return EngineArgs(model=str(tiny.folder), dtype="float32", max_model_len=256).create_engine_config()


def test_compilation_keys_differ(
    tiny: TinyLlama, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny, tmp_path / "v", torch.Generator(), "SteerVec")
    keys = [
        configured(tiny, None, monkeypatch).compute_hash(),
        configured(tiny, folder, monkeypatch).compute_hash(),
        configured(tiny, folder, monkeypatch, ACTSCALE_KINDS="ActivScalar,SteerVec").compute_hash(),
        configured(tiny, folder, monkeypatch, ACTSCALE_ROWS_PER_REQUEST="30").compute_hash(),
        configured(tiny, tmp_path, monkeypatch).compute_hash(),
    ]
    # The last one serves the kinds of the third, with another number of rows.
    assert len(set(keys)) == len(keys)
    assert keys[1] == configured(tiny, folder, monkeypatch).compute_hash()
    assert keys[0] == configured(tiny, None, monkeypatch).compute_hash()


def test_the_configuration_says_what_is_served(
    tiny: TinyLlama, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ServedModel.of_config(configured(tiny, None, monkeypatch)) is None
    served = ServedModel.of_config(configured(tiny, folder, monkeypatch))
    assert served is not None
    assert (served.n_layers, served.n_heads, served.head_dim, served.hidden_size) == (3, 4, 32, 128)
    assert (served.kinds, served.rows_per_request) == (("ActivScalar",), 8)
    save(tiny, tmp_path / "d", torch.Generator(), "DynScalar")
    served = ServedModel.of_config(configured(tiny, tmp_path, monkeypatch))
    assert served is not None
    assert (served.kinds, served.rows_per_request) == (("ActivScalar", "DynScalar"), 1)


def test_without_interventions_nothing_of_vllm_is_wrapped() -> None:
    """In a process of its own, as this one has had interventions."""
    import subprocess
    import sys

    program = """
from actscale_fast.integrations.vllm import compatibility
from vllm.plugins import load_general_plugins
load_general_plugins()
for one in compatibility.ADMISSION:
    found = __import__(one.module, fromlist=["_"])
    for part in one.name.split("."):
        found = getattr(found, part)
    assert "actscale" not in found.__code__.co_filename, one
print("as it was")
"""
    environment = {name: value for name, value in os.environ.items() if name != settings.FOLDER}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("as it was"), done.stderr[-2000:]
