"""Two processes that hold a model together, by tensor parallelism or FSDP2, give what one process gives."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from sharded_cases import ENGINES, claims_of, differences, errors_in, ranks_and_one

pytestmark = pytest.mark.slow

#: Without it, transformers' weights do not say how they are sharded.
SAYS_HOW = importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None
RUN = [engine for engine in ENGINES if SAYS_HOW or engine != "tensor parallelism"]
engines = pytest.mark.parametrize("engine", RUN)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks_and_one(tmp_path_factory.mktemp("sharded"), RUN)


@pytest.mark.parametrize(("engine", "claim"), [(engine, claim) for engine in RUN for claim in claims_of(engine)])
def test_two_processes_give_the_result_of_one(engine: str, claim: str, results: Any) -> None:
    ranks, expected = results
    assert not errors_in(expected[claim])
    for found in ranks:
        assert list(differences(found[engine][claim], expected[claim])) == []


@engines
@pytest.mark.parametrize(
    "what", ["unequal memory", "less memory later", "too little for one", "each by itself", "begun by one", "one disk"]
)
def test_processes_that_hold_a_model_share_its_work(engine: str, what: str, results: Any) -> None:
    ranks, expected = results
    for found in ranks:
        assert list(differences(found[engine]["shared work"][what], expected["shared work"][what])) == []


def test_a_head_that_is_divided_by_rows_gives_the_losses_of_the_whole_one(results: Any) -> None:
    ranks, expected = results
    for found in ranks:
        assert list(differences(found["heads"], expected["heads"])) == []
        assert max(one["of itself"] for one in found["heads"].values()) == 0.0
    assert all(
        found.equal(other)
        for name in expected["heads"]
        for found, other in zip(*(rank["heads"][name]["losses"] for rank in ranks), strict=True)
    )


def test_the_head_of_a_tensor_parallel_model_is_read_where_it_is(results: Any) -> None:
    for found in results[0]:
        if "tensor parallelism" in found:
            assert found["tensor parallelism"]["shared work"]["rows of the head"] == 13  # of 26
        assert found["FSDP2"]["shared work"]["rows of the head"] is None


@engines
def test_calls_that_differ_between_the_processes_are_an_error_in_each(engine: str, results: Any) -> None:
    for found in results[0]:
        shared = found[engine]["shared work"]
        for what in ("other examples", "evaluate others"):
            assert "examples: the 2 processes that hold the model have different examples" in shared[what]
        assert "distributed: the processes have different fits: seed differ" in shared["other settings"]
        assert "capture: got a model that is sharded over processes" in shared["graphs"]


@engines
@pytest.mark.parametrize("method", ["sami", "head-pursuit"])
def test_methods_that_read_weights_gather_them_or_are_refused(engine: str, method: str, results: Any) -> None:
    ranks, expected = results
    for found in ranks:
        scores = found[engine]["shared work"][method]
        if method == "head-pursuit" and engine == "FSDP2":
            assert "method: 'head-pursuit' reads weights of the output head, which is sharded over processes" in scores
        else:
            assert list(differences(scores, expected["shared work"][method])) == []


@engines
def test_one_process_writes_the_folder_of_a_sweep(engine: str, results: Any) -> None:
    first, second = (found[engine]["shared work"]["files"] for found in results[0])
    assert first == second
    assert len(first) == 2


@pytest.mark.skipif(len(RUN) < 2, reason="the only engine's processes are killed")
def test_a_process_without_memory_stops_all_with_a_reason(results: Any) -> None:
    first, second = (found[RUN[0]]["memory"] for found in results[0])
    assert "process 1 of the 2 that hold the model ran out of memory" in second
    assert "set memory_bytes=" in second
    assert "RuntimeError: distributed: process 1 stopped with OutOfMemoryError: out of memory" in first
    assert "A fit with checkpoint= and a sweep with folder= continue from what they have saved" in first


def test_a_process_that_is_killed_stops_the_other_one_with_a_reason(results: Any) -> None:
    error = results[0][0][RUN[-1]]["killed"]
    assert "RuntimeError: distributed: another process ended without a reason; it may have been killed" in error


def test_a_fit_of_which_one_process_was_killed_is_resumed_exactly(results: Any) -> None:
    ranks, expected = results
    assert list(differences(ranks[0]["resumed"], expected["killed"])) == []
