"""Two processes that hold a model together by tensor parallelism give what one process gives with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharded_cases import claims_of, differences, errors_in, ranks_and_one

pytestmark = pytest.mark.slow
pytest.importorskip("transformers.distributed.tensor_parallel", reason="weights that say how they are sharded")

NAMES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]


def load(name: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks_and_one(tmp_path_factory.mktemp("tensor_parallel"), load, NAMES)


@pytest.mark.parametrize("claim", claims_of(NAMES))
def test_two_processes_give_the_result_of_one(claim: str, results: Any) -> None:
    ranks, expected = results
    assert not errors_in(expected[claim])
    for found in ranks:
        assert list(differences(found[claim], expected[claim])) == []


@pytest.mark.parametrize("what", ["unequal memory", "each by itself", "begun by one", "one disk"])
def test_processes_that_hold_a_model_share_its_work(what: str, results: Any) -> None:
    ranks, expected = results
    for found in ranks:
        assert list(differences(found["shared work"][what], expected["shared work"][what])) == []


def test_calls_that_differ_between_the_processes_are_an_error_in_each(results: Any) -> None:
    for found in results[0]:
        shared = found["shared work"]
        for what in ("other examples", "evaluate others"):
            assert "examples: the 2 processes that hold the model have different examples" in shared[what]
        assert "distributed: the processes have different fits: seed differ" in shared["other settings"]
        assert "capture: got a model that is sharded over processes" in shared["graphs"]


def test_methods_that_read_weights_are_refused(results: Any) -> None:
    for found in results[0]:
        for method in ("sami", "head-pursuit"):
            assert f"method: '{method}' reads weights, which are sharded" in found["shared work"][method]


def test_one_process_writes_the_folder_of_a_sweep(results: Any) -> None:
    first, second = (found["shared work"]["files"] for found in results[0])
    assert first == second
    assert len(first) == 2


def test_a_process_without_memory_stops_all_with_a_reason(results: Any) -> None:
    first, second = (found["memory"] for found in results[0])
    assert "process 1 of the 2 that hold the model ran out of memory" in second
    assert "set memory_bytes=" in second
    assert "RuntimeError" in first  # of the connection that the other one closed
