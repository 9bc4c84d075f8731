"""Fixtures of the tests that run vLLM itself; `make test-vllm` collects them in an environment of their own."""

from __future__ import annotations

import os

# Before vLLM is imported. The engine runs in the test's process, so that its parts can be looked at.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    ACTSCALE_VERIFY="0",
    PYTHONSAFEPATH="1",  # processes that a test starts find the installed package
)

from pathlib import Path

import pytest
from tiny_llama import TinyLlama, make_interventions, make_model

import actscale_fast.ops._C  # noqa: F401 (without its compiled kernels the tests would run another op)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """A small Llama with random weights, saved and as a model of transformers."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def folder(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved scalars for the tiny model, by name."""
    found = tmp_path_factory.mktemp("interventions")
    make_interventions(tiny, found)
    return found
