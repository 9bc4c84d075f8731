"""Requests that join, leave, are aborted, computed in chunks, preempted or speculated on stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import BLOCK, Edit, ask, params, require_equal, scaling, serving
from tiny_llama import TinyLlama

import actscale_fast as af


def kinds(folder: Path, n: int) -> list[tuple[dict[str, Any], Edit | None]]:
    """Requests with a prompt of n tokens, and the oracle's edits."""
    a, b = (af.load_intervention(folder / name).alpha.detach()[:, 0] for name in "ab")
    return [
        ({}, None),
        ({"actscale": "a"}, scaling(a, 1.0)),
        ({"actscale": "a", "actscale_strength": -1.0}, scaling(a, -1.0)),
        ({"actscale": "b", "actscale_strength": 0.5, "actscale_where": "prompt"}, scaling(b, 0.5, lambda at: at < n)),
        (
            {"actscale": "b", "actscale_strength": -0.7, "actscale_where": "generated"},
            scaling(b, -0.7, lambda at: at >= n),
        ),
        ({"actscale": "a", "actscale_where": [n // 2]}, scaling(a, 1.0, lambda at: at == n // 2)),
    ]


def batch(folder: Path, lengths: Sequence[int]) -> list[tuple[list[int], dict[str, Any], Edit | None]]:
    """One request of each kind for each prompt length."""
    prompts = [[(3 * start + token) % 190 for token in range(length)] for start, length in enumerate(lengths)]
    return [(prompt, extra, edit) for prompt in prompts for extra, edit in kinds(folder, len(prompt))]


def test_requests_join_leave_and_are_aborted(tiny: TinyLlama, folder: Path) -> None:
    asked = batch(folder, [4, 40])
    finished: dict[str, Any] = {}
    with serving(tiny, folder, max_num_seqs=4) as llm:  # fewer than there are requests: they also wait
        engine = llm.llm_engine
        waiting = [(str(number), prompt, extra) for number, (prompt, extra, _) in enumerate(asked)]
        aborted = {"1", "6"}
        step = 0
        while waiting or engine.has_unfinished_requests():
            if waiting and step % 2 == 0:
                name, prompt, extra = waiting.pop(0)
                n_tokens = 30 if name in aborted else 4 + len(waiting)
                engine.add_request(name, {"prompt_token_ids": prompt}, params(n_tokens=n_tokens, **extra))
            if step == 9:
                engine.abort_request(["1"])
            if step == 19:
                engine.abort_request(["6"])
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
            step += 1
        held = llm.collective_rpc("actscale_status")[0]
    for number, (prompt, _, edit) in enumerate(asked):
        if str(number) not in aborted:
            require_equal(tiny, prompt, finished[str(number)], edit)
    assert held["rows_held"] <= held["rows"] == 4 * 8


def test_prompts_computed_in_chunks(tiny: TinyLlama, folder: Path) -> None:
    asked = batch(folder, [90, 7])
    with serving(tiny, folder, max_num_batched_tokens=BLOCK, max_num_seqs=6, enable_chunked_prefill=True) as llm:
        results = ask(llm, [(prompt, params(**extra)) for prompt, extra, _ in asked])
    for (prompt, _, edit), result in zip(asked, results, strict=True):
        require_equal(tiny, prompt, result, edit)


def test_preempted_requests_compute_generated_tokens_again_as_generated_ones(
    tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = batch(folder, [20, 30])
    with serving(tiny, folder, num_gpu_blocks_override=14, enable_prefix_caching=False) as llm:
        results = ask(llm, [(prompt, params(n_tokens=70, **extra)) for prompt, extra, _ in asked])
        count = next(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")
    assert count > 0
    for (prompt, _, edit), result in zip(asked, results, strict=True):
        require_equal(tiny, prompt, result, edit)


def test_speculated_tokens_are_verified_by_the_steered_model_in_a_process_of_its_own(
    tiny: TinyLlama, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the test's own process, numba, which the speculation imports, would keep vLLM from starting another engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    repeated = [[5, 6, 7, 8] * 8, [9, 9, 10] * 12]
    asked = [(prompt, extra, edit) for prompt in repeated for extra, edit in kinds(folder, len(prompt))]
    with serving(tiny, folder, speculative_config=speculation) as llm:
        results = ask(llm, [(prompt, params(n_tokens=40, **extra)) for prompt, extra, _ in asked])
        drafted = next(one.value for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_draft_tokens")
    assert drafted > 0
    for (prompt, _, edit), result in zip(asked, results, strict=True):
        require_equal(tiny, prompt, result, edit)


def test_more_interventions_than_rows_over_time(tiny: TinyLlama, folder: Path) -> None:
    alpha, prompt = af.load_intervention(folder / "a").alpha.detach()[:, 0], [1, 2, 3, 4]
    with serving(tiny, folder, max_num_seqs=2) as llm:
        strengths = [number / 20 - 1 for number in range(40)]
        results = ask(llm, [(prompt, params(4, actscale="a", actscale_strength=beta)) for beta in strengths])
        status = llm.collective_rpc("actscale_status")[0]
    assert status["rows_written"] > status["rows"]
    for beta, result in zip(strengths, results, strict=True):
        require_equal(tiny, prompt, result, scaling(alpha, beta))
