"""Some architectures of each kind; `python -m tests.oracle.table` runs them all, for docs/models.md."""

from __future__ import annotations

import pytest
import torch
from oracle.checks import check
from oracle.table import architectures
from oracle.verdicts import CRASH, WRONG

#: Of each kind of layout at least one; none that takes seconds to make.
CHOSEN = [
    "llama",
    "gemma2",  # norms after both sites
    "gemma3",  # the text tower of a vision-language model
    "gemma4_text",  # layers whose heads differ in width
    "gemma3n_text",  # four streams
    "qwen3_next",  # a hybrid with a gate after the heads
    "lfm2",  # a hybrid with convolutions
    "falcon_h1",  # attention and a state space in one layer
    "nemotron_h",  # layers of four kinds under one name
    "zamba",  # one attention block in several layers
    "deepseek_v3",  # values wider than keys
    "gpt_oss",  # experts that return a tuple
    "granitemoeshared",  # an MLP in two modules
    "bart",  # a decoder with another number of heads than its encoder
    "opt",
    "bert",
    "gpt2",
    "openai-gpt",  # layers that return a list, attention of its own
    "bloom",
    "bitnet",  # a norm over all heads
    "diffllama",  # heads that are subtracted
    "dory",  # layers that run twice
    "zaya",  # layers that hand more on than the stream
    "xlnet",  # tokens before rows
    "mamba",  # no attention
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # sites that cannot act, shortcuts that are not taken
@pytest.mark.parametrize("model_type", CHOSEN)
def test_every_site_is_right_or_refused_with_a_reason(model_type: str) -> None:
    known = architectures()
    if model_type not in known:
        pytest.skip(f"this transformers has no {model_type}")
    row = check(model_type, known[model_type])
    assert not row.made, f"the tiny model cannot be made: {row.made}"
    checks = {**row.sites, "generate": row.generate, "fit": row.fit}
    bad = {name: str(verdict) for name, verdict in checks.items() if verdict.verdict in (WRONG, CRASH)}
    assert not bad


def test_the_oracle_tells_a_wrong_layer_from_the_right_one() -> None:
    from oracle.oracle import call
    from oracle.subject import IDS, Subject

    import actscale_fast as af

    subject = Subject("llama", architectures()["llama"])
    scalars = af.ActivScalar.for_model(subject.model, layers=[1])
    scalars.alpha.data.fill_(0.5)
    with torch.no_grad(), af.patch(subject.model, scalars):
        found = call(subject.model, IDS)
    n_heads = subject.oracle.heads[1][0]
    for layer, agrees in ((1, True), (2, False)):
        factors = {layer: found.new_full((1, n_heads), 1.5)}
        expected = subject.oracle.logits(IDS, "head", factors)
        assert subject.agrees(found, expected, subject.plain)[0] is agrees


@pytest.mark.parametrize("model_type", ["openai-gpt", "bloom", "mpt", "gpt_neo"])
def test_heads_scaled_in_the_weights_are_those_at_the_projection(model_type: str) -> None:
    """The oracle's two ways to the heads of a family with an attention of its own."""
    from oracle.oracle import call
    from oracle.subject import IDS, Subject

    subject = Subject(model_type, architectures()[model_type])
    factors = {layer: torch.linspace(-1, 2, heads)[None].double() for layer, (heads, _) in subject.oracle.heads.items()}
    with torch.no_grad():
        in_weights = subject.oracle.logits(IDS, "head", factors)
        with subject.oracle.columns(factors):
            at_projection = call(subject.model, IDS)
    assert subject.agrees(at_projection, in_weights, subject.plain)[0]
