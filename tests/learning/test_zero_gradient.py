"""A fit that cannot move says why, and one that only seems so goes on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts, run
from model_zoo import tiny_model

import actscale_fast as af
from actscale_fast.learning.fit_settings import FitSettings


@torch.no_grad()
def apart(model: Any, n: int, *, correct: bool) -> list[af.Example]:
    """Conflicts whose correct answer the frozen model prefers, or does not."""
    found, tokenizer = [], tiny.tokenizer()
    for example in conflicts(60, seed=5):
        z = model(**tokenizer(example.prompt, return_tensors="pt")).logits[0, -1]
        c, w = tokenizer.convert_tokens_to_ids([example.correct.strip(), example.wrong.strip()])
        found += [example] * (bool(z[c] > z[w]) == correct)
    return found[:n]


def test_positions_that_no_prompt_has_are_named() -> None:
    model = tiny.llama()
    far = af.ActivScalar.for_model(model, positions=[40, -30])
    message = r"the gradient is exactly 0 for all 24 parameters .* positions: got \[40, -30\], but no prompt has such a"
    with pytest.raises(ValueError, match=message):
        run(model, conflicts(6), intervention=far)
    assert far.n_active == 0


@pytest.mark.parametrize("site", ["head", "attn_out", "mlp_out"])
def test_a_last_layer_without_the_last_token_is_named(site: str) -> None:
    model = tiny.llama()
    early = af.ActivScalar.for_model(model, site=site, layers=[-1], positions=[0, 1])
    with pytest.raises(ValueError, match=r"layers: got \[2\], the last layer, where only the prompt's last token"):
        run(model, conflicts(6), intervention=early)


def test_each_part_of_a_composite_is_named() -> None:
    model = tiny.llama()
    both = af.ActivScalar.for_model(model, positions=[40]) + af.SteerVec.for_model(model, layers=[2], positions=[0])
    with pytest.raises(ValueError, match=r"but no prompt has such a token .*; layers: got .* the last layer"):
        run(model, conflicts(6), intervention=both)


def test_other_causes_are_called_likely() -> None:
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(ValueError, match="the likely causes are: what it changes does not reach the answers"):
        run(model, conflicts(6))


def test_examples_that_need_nothing_are_named() -> None:
    model = tiny.llama()
    objective = af.Objective(margin=0.0, directions=(1,), minimality=0.0)
    scalars = af.ActivScalar.for_model(model)
    with pytest.raises(ValueError, match=r"already has the answers apart by the margin of 0 under β = \+1,"):
        run(model, apart(model, 4, correct=True), objective, intervention=scalars, batch_size=2)
    assert scalars.n_active == 0  # and rounding of the KL's gradient has not become a step


def test_a_batch_that_needs_nothing_does_not_stop_a_fit_or_move_it() -> None:
    model = tiny.llama()
    examples = apart(model, 3, correct=True) + apart(model, 3, correct=False)
    seed = next(s for s in range(99) if set(FitSettings(batch_size=3, seed=s).rows(6, 0)) == {0, 1, 2})
    objective = af.Objective(margin=0.0, directions=(1,), minimality=0.0)
    for steps, moves in ((1, False), (2, True)):
        found = run(model, examples, objective, steps=steps, batch_size=3, seed=seed, schedule="constant")
        assert (found.intervention.n_active > 0) is moves


def test_a_fit_from_an_earlier_result_may_have_nothing_to_do() -> None:
    model = tiny.llama()
    objective = af.Objective(margin=0.0, faithfulness=0.0, directions=(1,), minimality=0.0)
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha[0, 0, 0] = 1e-6
    run(model, apart(model, 4, correct=True), objective, intervention=scalars)
    assert scalars.n_active == 1


def test_a_point_of_a_sweep_that_cannot_move_has_an_error_and_the_others_go_on() -> None:
    model = tiny.llama()
    early = af.ActivScalar.for_model(model, positions=[0])
    with pytest.warns(UserWarning, match=r"sweep: layers=2: intervention: the gradient is exactly 0 .* the last layer"):
        result = af.sweep(
            model, tiny.tokenizer(), conflicts(6), {"layers": [[2], [0]]}, intervention=early, steps=2, progress=False
        )
    stopped, other = result.fits
    assert stopped.error is not None
    assert "the last layer" in stopped.error
    assert other.error is None
    assert len(other.history) == 2


@pytest.mark.parametrize(("family", "site", "norm"), [
    ("gemma2", "attn_out", "post_attention_layernorm"),
    ("gemma3_text", "mlp_out", "post_feedforward_layernorm"),
    ("olmo2", "attn_out", "post_attention_layernorm"),
    ("olmo2", "mlp_out", "post_feedforward_layernorm"),
])  # fmt: skip
def test_a_site_before_a_norm_offers_the_site_after_it(family: str, site: str, norm: str) -> None:
    model = tiny_model(family)
    offer = rf"can be scaled: for_model\(\.\.\., site='mlp_out', mlp='{norm}'\)"
    with pytest.warns(UserWarning, match=offer):
        idle = af.ActivScalar.for_model(model, site=site)
    with pytest.raises(ValueError, match=f"so there is nothing to learn; use .*{offer}"):
        run(model, conflicts(6), intervention=idle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = af.ActivScalar.for_model(model, site="mlp_out", mlp=norm)
    with torch.no_grad():
        after.alpha.fill_(0.5)
    ids = torch.tensor([[5, 9, 12, 7]])
    handles = [layer.get_submodule(norm).register_forward_hook(lambda *a: 1.5 * a[2]) for layer in model.model.layers]
    expected = model(ids).logits
    for handle in handles:
        handle.remove()
    with af.patch(model, after):
        torch.testing.assert_close(model(ids).logits, expected)
