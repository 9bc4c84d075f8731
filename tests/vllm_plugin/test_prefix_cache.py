"""Keys and values of one kind of request are never read by another; without the salt they would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import BLOCK, ask, log_probabilities, params, require_equal, said, scaling, serving
from tiny_llama import TinyLlama

import actscale_fast as af
from actscale_fast.integrations.vllm import admission

PROMPT = list(range(10, 10 + 4 * BLOCK + 3))
#: (what is asked first, what is asked then)
PAIRS = [
    ({}, {"actscale": "a"}),
    ({"actscale": "a"}, {}),
    ({"actscale": "a"}, {"actscale": "a", "actscale_strength": -1.0}),
    ({"actscale": "a"}, {"actscale": "b"}),
    ({"actscale": "a"}, {"actscale": "a", "actscale_where": "prompt"}),
    ({"actscale": "a", "actscale_where": [0]}, {"actscale": "a", "actscale_where": [1]}),
]


def cached(result: Any) -> int:
    return int(result.num_cached_tokens or 0)


@pytest.fixture(scope="module")
def alone(tiny: TinyLlama, folder: Path) -> dict[str, Any]:
    """The answer to each request of the pairs, from an engine without a prefix cache."""
    kinds = {repr(extra): extra for pair in PAIRS for extra in pair}
    with serving(tiny, folder, enable_prefix_caching=False) as engine:
        return {name: ask(engine, [(PROMPT, params(**extra))])[0] for name, extra in kinds.items()}


def test_requests_that_differ_read_nothing_from_each_other(
    tiny: TinyLlama, folder: Path, alone: dict[str, Any]
) -> None:
    with serving(tiny, folder, enable_prefix_caching=True) as engine:
        for pair in PAIRS:
            engine.reset_prefix_cache()
            for extra in pair:
                result = ask(engine, [(PROMPT, params(**extra))])[0]
                assert cached(result) == 0
                assert said(result) == said(alone[repr(extra)])
                assert (log_probabilities(result) - log_probabilities(alone[repr(extra)])).abs().max() < 1e-4


def test_the_same_request_again_reads_what_it_wrote(tiny: TinyLlama, folder: Path) -> None:
    with serving(tiny, folder, enable_prefix_caching=True) as engine:
        for extra in ({}, {"actscale": "a"}, {"actscale": "p"}, {"actscale": "a", "actscale_where": "generated"}):
            first, second = (ask(engine, [(PROMPT, params(**extra))])[0] for _ in range(2))
            assert (cached(first), cached(second)) == (0, 4 * BLOCK)
            assert said(first) == said(second)
        longer = ask(engine, [([*PROMPT, 5], params(actscale="a"))])[0]  # steered everywhere: the length says nothing
        assert cached(longer) == 4 * BLOCK


def test_without_the_salt_an_unsteered_request_would_be_wrong(
    tiny: TinyLlama, folder: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "salted", lambda client_salt, plan: client_salt)
    with serving(tiny, folder, enable_prefix_caching=True) as engine:
        ask(engine, [(PROMPT, params(actscale="a"))])
        result = ask(engine, [(PROMPT, params())])[0]
    assert cached(result) == 4 * BLOCK
    assert (log_probabilities(result) - log_probabilities(alone["{}"])).abs().max() > 0.1


def test_generated_tokens_of_one_turn_are_prompt_in_the_next(tiny: TinyLlama, folder: Path) -> None:
    alpha = af.load_intervention(folder / "a").alpha.detach()[:, 0]
    where = {"actscale": "a", "actscale_where": "generated"}
    prompt = list(PROMPT)
    with serving(tiny, folder, enable_prefix_caching=True) as engine:
        for _ in range(3):
            result = ask(engine, [(prompt, params(n_tokens=BLOCK + 2, **where))])[0]
            n = len(prompt)
            require_equal(tiny, prompt, result, scaling(alpha, 1.0, lambda at, n=n: at >= n))  # type: ignore[misc]
            assert cached(result) == 0
            prompt = [*prompt, *said(result), 7]


def test_the_clients_own_salt_still_separates(tiny: TinyLlama, folder: Path) -> None:
    with serving(tiny, folder, enable_prefix_caching=True) as engine:

        def tokens_cached(salt: str) -> int:
            prompt = {"prompt_token_ids": PROMPT, "cache_salt": salt}
            return cached(engine.generate([prompt], params(actscale="a"), use_tqdm=False)[0])

        assert [tokens_cached(salt) for salt in ("x", "y", "x")] == [0, 0, 4 * BLOCK]


def test_an_intervention_that_was_replaced_has_another_salt(tiny: TinyLlama, folder: Path, tmp_path: Path) -> None:
    intervention = af.load_intervention(folder / "a")
    intervention.save_pretrained(tmp_path / "x")
    with serving(tiny, tmp_path, enable_prefix_caching=True) as engine:
        before = ask(engine, [(PROMPT, params(actscale="x"))])[0]
        with torch.no_grad():
            intervention.alpha.mul_(-1.0)
        intervention.save_pretrained(tmp_path / "x")
        after = ask(engine, [(PROMPT, params(actscale="x"))])[0]
    assert cached(after) == 0
    assert said(before) != said(after)
    require_equal(tiny, PROMPT, after, scaling(intervention.alpha.detach()[:, 0], 1.0))
