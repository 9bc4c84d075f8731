"""The report on a model whose norms undo factors at the sites: its scalars act on what the norms return."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from report_size import TINY
from word_models import LATE_CAPITALS, tokenizer

import actscale_fast as af
from actscale_fast import plots
from actscale_fast.reproduction import recipes
from actscale_fast.reproduction.measuring import places
from actscale_fast.reproduction.preface import moved_sites
from actscale_fast.reproduction.systems import system_named

NORMS = ["post_attention_layernorm", "post_feedforward_layernorm"]


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokens = tokenizer(without=LATE_CAPITALS)
    config = Gemma3TextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).eval(), tokens


def test_scalars_by_position_act_after_the_norms_and_vectors_before(opened: tuple[Any, Any]) -> None:
    model, _ = opened
    scalars, vectors = (system_named(name).make(model, 3) for name in ("scalars-by-position", "vectors-by-position"))
    assert [single.location.site for single in scalars.singles] == ["mlp_out", "mlp_out"]
    assert [single.location.paths["mlp"] for single in scalars.singles] == NORMS
    assert [(single.location.site, single.location.paths) for single in vectors.singles] == [
        ("attn_out", {}), ("mlp_out", {}),
    ]  # fmt: skip
    tokens = torch.arange(4, 12)[None]
    for parameter in (*scalars.parameters(), *vectors.parameters()):
        plain = model(tokens).logits
        with torch.no_grad():
            parameter.normal_()
        with af.patch(model, scalars + vectors):
            assert not torch.allclose(model(tokens).logits, plain, atol=1e-3)
        with torch.no_grad():
            parameter.zero_()


def test_places_after_different_norms_are_different_places(opened: tuple[Any, Any]) -> None:
    made = system_named("scalars-by-position").make(opened[0], 2)
    with torch.no_grad():
        for single in made.singles:
            single.alpha[0, 1] = 0.5
    assert len(set(places(made))) == 2
    assert places(made)[0] == (f"mlp_out ({NORMS[0]})", 0, 1, 0)


def test_a_map_names_the_norm_that_a_panel_is_about(opened: tuple[Any, Any]) -> None:
    made = system_named("scalars-by-position").make(opened[0], 2)
    titles = [axes.get_title(loc=where) for axes in plots.heatmap(made).axes for where in ("left", "center")]
    assert [title for title in titles if title not in ("", "α")] == [f"outputs of {norm}" for norm in NORMS]


def test_the_report_says_what_is_edited_instead_of_the_sites(opened: tuple[Any, Any]) -> None:
    (words,) = moved_sites(SimpleNamespace(model=opened[0]))  # type: ignore[arg-type]
    assert all(f"`{norm}`" in words for norm in NORMS)


@pytest.mark.slow
def test_a_whole_report_is_made(opened: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "latent", lambda _: {"impossible": "left out of this test"})
    report = af.reproduce(*opened, tmp_path, size=TINY, progress=False).read_text()
    assert f"`{NORMS[0]}` and `{NORMS[1]}`" in report
    for site in ("attn_out", "mlp_out"):
        assert list((tmp_path / "csv").glob(f"*positions-{site}.csv"))
