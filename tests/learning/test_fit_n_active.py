"""`fit(..., n_active=n)`: at most n scalars, chosen by a path and fitted without the ℓ1 term."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from engine_cases import full
from fit_cases import OBJECTIVE, conflicts, run

import actscale_fast as af
from actscale_fast.learning.encoded_examples import EncodedExamples

pytestmark = pytest.mark.usefixtures("unchecked_fits")

SETTINGS: dict[str, Any] = {"steps": 12, "batch_size": 9}


@pytest.mark.parametrize("n", [1, 3, 6, 12])
def test_at_most_so_many_scalars_are_active_and_fitted_without_the_l1_term(n: int) -> None:
    found = run(tiny.llama(), conflicts(9), OBJECTIVE, n_active=n, **SETTINGS)
    assert 1 <= found.intervention.n_active <= n
    assert found.objective is not None
    assert found.objective.minimality == 0
    chosen = max(record["n_active"] for record in found.path if record["n_active"] <= n)
    assert {record["n_active"] for record in found.history} == {chosen}
    for record in found.history:
        assert record["loss"] == pytest.approx(record["effectiveness"] + 0.5 * record["faithfulness"])
    largest = run(tiny.llama(), conflicts(9), replace(OBJECTIVE, minimality="100%"), steps=1).objective.minimality
    assert found.path[0]["minimality"] == pytest.approx(0.75 * largest)
    again = run(tiny.llama(), conflicts(9), OBJECTIVE, n_active=n, **SETTINGS)
    assert torch.equal(again.intervention.alpha, found.intervention.alpha)
    assert again.path == found.path


def test_the_start_and_the_weight_do_not_matter() -> None:
    plain = run(tiny.llama(), conflicts(9), OBJECTIVE, n_active=4, **SETTINGS)
    model = tiny.llama()
    started = af.ActivScalar.for_model(model)
    with torch.no_grad():
        started.alpha.fill_(0.3)
    objective = af.Objective(margin=2.0, faithfulness=0.5, minimality="70%")
    found = run(model, conflicts(9), objective, intervention=started, n_active=4, **SETTINGS)
    assert torch.equal(found.intervention.alpha, plain.intervention.alpha)


def test_the_chosen_scalars_are_fitted_as_adam_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny.llama(), conflicts(9)
    scalars = af.ActivScalar.for_model(model)
    start = torch.zeros_like(scalars.alpha)
    start[0, 0, 1], start[1, 0, 3], start[2, 0, 0] = 0.2, -0.1, 0.05

    def choose(engine: Any, *given: Any) -> list[dict[str, float]]:
        with torch.no_grad():
            engine.intervention.alpha.copy_(start)
        return []

    monkeypatch.setattr(sys.modules["actscale_fast.learning.fit"], "choose_active", choose)  # fit is a function too
    run(model, examples, OBJECTIVE, intervention=scalars, n_active=3, schedule="constant", **SETTINGS)

    wide = tiny.llama(dtype=torch.float64)
    data = EncodedExamples(examples, tiny.tokenizer(), wide)
    expected = af.ActivScalar.for_model(wide)
    with torch.no_grad():
        expected.alpha.copy_(start)
    adam = torch.optim.Adam([expected.alpha], lr=0.05, betas=(0.9, 0.99))
    for _ in range(12):
        expected.alpha.grad = (full(wide, data, expected, OBJECTIVE)[1][0] * (start != 0)).float()
        adam.step()
    torch.testing.assert_close(scalars.alpha, expected.alpha, rtol=1e-3, atol=1e-4)
    assert torch.equal(scalars.alpha != 0, start != 0)


def test_sums_of_scalars_are_chosen_from_together() -> None:
    model = tiny.llama()
    both = af.ActivScalar.for_model(model, site="mlp_out") + af.ActivScalar.for_model(model)
    found = run(model, conflicts(9), OBJECTIVE, intervention=both, n_active=4, **SETTINGS)
    assert 1 <= found.intervention.n_active <= 4


def test_what_cannot_be_combined_is_refused(tmp_path: Any) -> None:
    model = tiny.llama()
    for n in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=f"n_active: got {n}, expected a positive integer"):
            run(model, conflicts(4), n_active=n)
    with pytest.raises(ValueError, match="n_active: got 13, expected at most 12, the number of scalars"):
        run(model, conflicts(4), n_active=13)
    with pytest.raises(TypeError, match="n_active: got SteerVec, expected a single ActivScalar or a sum"):
        run(model, conflicts(4), intervention=af.SteerVec.for_model(model), n_active=2)
    with pytest.raises(ValueError, match="n_active: cannot be combined with a checkpoint"):
        run(model, conflicts(4), n_active=2, checkpoint=tmp_path / "fit.safetensors")
    early = af.ActivScalar.for_model(model, layers=[-1], positions=[0])
    with pytest.raises(ValueError, match=r"the gradient is exactly 0 .* the last layer"):
        run(model, conflicts(4), intervention=early, n_active=2)
