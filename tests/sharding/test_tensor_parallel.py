"""Two processes that hold a model together by tensor parallelism give what one process gives with the whole model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from sharded_cases import CLAIMS, SHORT, differences, ranks_and_one

pytestmark = pytest.mark.slow

NAMES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]


def load(name: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks_and_one(tmp_path_factory.mktemp("tensor_parallel"), load, NAMES)


@pytest.mark.parametrize("claim", [f"{name}: {claim}" for name in NAMES for claim in (CLAIMS if name == "llama" else SHORT)])
def test_two_processes_give_the_result_of_one(claim: str, results: Any) -> None:
    ranks, expected = results
    for found in ranks:
        assert list(differences(found[claim], expected[claim])) == []
