"""Each family: a step that runs what an intervention can change has the gradients of the full computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import PROMPTS as EVERY, TokenExamples, assert_equal_to_rounding, engine, full
from model_zoo import CONFIGS, randomised, tiny_model, transformers_before

import actscale_fast as af
from actscale_fast.architectures.lm_head import read_head
from actscale_fast.interventions import Intervention
from actscale_fast.learning.engine import Engine, FitRequest

PROMPTS = EVERY[:3]
OBJECTIVE = af.Objective(margin=3.0, faithfulness=0.7)
CONES: dict[str, dict[str, Any]] = {
    "all heads": {},
    "heads of the upper layer": {"layers": [1]},
    "heads at the last token": {"positions": [-1]},
    "heads of the upper layer at two tokens": {"positions": [-2, -1], "layers": [1]},
    "residual, lowest layer": {"site": "residual", "layers": [0]},
    "residual, highest layer": {"site": "residual", "layers": [1]},
    "residual, highest layer, last token": {"site": "residual", "layers": [1], "positions": [-1]},
    "attention output": {"site": "attn_out"},
}


#: Their attention takes the softmax of float64 scores in float32, where the mask is −inf: a padded token is NaN.
FLOAT32_SOFTMAX = {"bloom", "gemma2", "mpt"}


def agree(family: str, intervention: Intervention) -> None:
    """In float64 with padding; where a model has no such thing in float64 without and in float32 with it."""
    whole = family not in FLOAT32_SOFTMAX
    cases = [(torch.float64, PROMPTS if whole else [prompt for prompt in PROMPTS if len(prompt) == 12] * 2, 2e-6)]
    if not whole:
        cases.append((torch.float32, PROMPTS, 1e-4))
    for dtype, prompts, tolerance in cases:
        model, data = tiny_model(family, dtype=dtype), TokenExamples(prompts)
        expected = full(model, data, intervention, OBJECTIVE)
        found = engine(model, data, intervention, OBJECTIVE, checked=False)
        assert_equal_to_rounding(found, expected, tolerance)


def families_and_cones() -> list[tuple[str, str]]:
    """Each family with all heads, with the attention output, and with one narrower region of each other kind, in turn.

    Which layers and tokens a region has is found in the same way for every family, and each region is tried on eight
    families at least; what a family does in its layers shows in any region of a site.
    """
    heads, residual = ([name for name in CONES if name.startswith(kind)] for kind in ("heads", "residual"))
    found = []
    for number, family in enumerate(sorted(CONFIGS)):
        narrower = heads[number % len(heads)], residual[number // len(heads) % len(residual)]
        found += [(family, cone) for cone in ("all heads", "attention output", *narrower)]
    return found


@pytest.mark.parametrize(("family", "cone"), families_and_cones())
def test_gradients_are_those_of_the_full_computation(family: str, cone: str) -> None:
    scalars = af.ActivScalar.for_model(tiny_model(family), **CONES[cone])
    agree(family, scalars)  # all zero: both directions share the whole model
    randomised(scalars)
    with torch.no_grad():
        scalars.alpha.mul_(0.3)
    agree(family, scalars)
    if len(scalars.location.layers) > 1:
        with torch.no_grad():
            scalars.alpha[0] = 0  # both directions share the lowest layer
        agree(family, scalars)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mpt"])
@pytest.mark.parametrize("site", ["head", "mlp_out", "residual"])
def test_vectors_have_the_gradients_of_the_full_computation(family: str, site: str) -> None:
    vectors = af.SteerVec.for_model(tiny_model(family), site=site, positions=[-3, -1])
    agree(family, vectors)
    randomised(vectors)
    agree(family, vectors)
    with torch.no_grad():
        vectors.vectors[0] = 0
    agree(family, vectors)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_goes_through_its_head_as_numbers(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    arguments = {"input_ids": torch.tensor([[5, 9, 12]])}
    head = read_head(model, arguments)
    assert head is not None
    hidden = torch.randn(3, head.weight.shape[1], dtype=torch.float64)
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: (hidden[:1, None],))
    torch.testing.assert_close(head.logits(hidden[:1]), model(**arguments).logits[:, -1])


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_step_leaves_what_is_kept_as_it_was(family: str) -> None:
    if family == "stablelm" and transformers_before("5.2"):
        pytest.skip("StableLM's mask is a token too long beside a cache before transformers 5.2, so none is kept")
    model, data = tiny_model(family), TokenExamples(PROMPTS)
    scalars = af.ActivScalar.for_model(model, layers=[1], positions=[-2, -1])
    with Engine(model, data, scalars, [OBJECTIVE]) as opened:
        before = {name: value.clone() for name, value in opened.runner.store.near.items()}
        assert sorted(before.keys() - {"logits"}) == ["hidden", "keys.1", "values.1"]  # logits: of a soft-cap
        for value in (0.0, 0.3):
            with torch.no_grad():
                scalars.alpha.fill_(value)
            opened.gradients([FitRequest(range(3), OBJECTIVE)])
        assert all(torch.equal(value, before[name]) for name, value in opened.runner.store.near.items())
