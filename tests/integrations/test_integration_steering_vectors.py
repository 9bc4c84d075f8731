"""steering-vectors: the same logits, the same bits there and back, and where the two differ in tokens."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

import pytest
import torch
from model_zoo import IDS, logits, randomised, tiny_model
from steering_vectors import SteeringVector, ablation_operator
from torch import Tensor

import actscale_fast as af
from actscale_fast.integrations.steering_vectors import SITES, from_steering_vectors, to_steering_vectors

FAMILIES = ["llama", "gpt2", "gpt_neox", "bloom"]


def theirs(layers: tuple[int, ...] = (0, 1), kind: Any = "decoder_block", seed: int = 3, **kwargs: Any) -> Any:
    source = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(32, generator=source, **kwargs) for layer in layers}, kind)


def steered(model: Any, vector: SteeringVector, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with vector.apply(model, **kwargs):
        return logits(model, ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("multiplier", [1.0, -1.7])
def test_the_logits_are_those_of_the_library(family: str, kind: str, multiplier: float) -> None:
    model, vector = tiny_model(family), theirs(kind=kind)
    expected = steered(model, vector, multiplier=multiplier)
    with af.patch(model, from_steering_vectors(vector, model), strength=multiplier):
        got = logits(model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, logits(model), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_ours_is_at_least_as_exact(dtype: torch.dtype) -> None:
    model, exact, vector = tiny_model(dtype=dtype), tiny_model(dtype=dtype).double(), theirs()
    expected = steered(model, vector, multiplier=0.3)
    ours = from_steering_vectors(vector, model)
    with af.patch(model, ours, strength=0.3):
        got = logits(model)
    with af.ops.use_backend("reference"), af.patch(exact, ours, strength=0.3):
        truth = logits(exact)
    assert (got - truth).abs().max() <= 2 * (expected - truth).abs().max()


@pytest.mark.parametrize("given", [[-1], [0, 3], [1, -2]])
def test_token_indices_of_a_prompt_are_positions(given: list[int]) -> None:
    model, vector = tiny_model(), theirs()
    expected = steered(model, vector, token_indices=given, min_token_index=None)  # its default, 0, excludes indices
    with af.patch(model, from_steering_vectors(vector, model, positions=given)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_library_where_every_token_is_steered() -> None:
    model, vector = tiny_model(), theirs()
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given["attention_mask"] = torch.ones_like(IDS)
    with vector.apply(model, multiplier=2.0):
        expected = model.generate(IDS, **given)
    with af.patch(model, from_steering_vectors(vector, model), strength=2.0):
        assert torch.equal(model.generate(IDS, **given), expected)
    assert not torch.equal(model.generate(IDS, **given), expected)


def test_from_a_token_on_ours_goes_on_while_decoding_and_theirs_stops() -> None:
    """Theirs with a KV cache counts columns of each pass: min_token_index=2 steers no decoded token."""
    model, vector, prompt = tiny_model(), theirs(), IDS[:1]
    ours = from_steering_vectors(vector, model, positions=range(2, 6), generated=True)
    given: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given |= {"attention_mask": torch.ones_like(prompt), "output_logits": True, "return_dict_in_generate": True}
    with af.patch(model, ours):
        found = model.generate(prompt, **given)
    with vector.apply(model, min_token_index=2):
        stopped = model.generate(prompt, **given)
    whole = steered(model, vector, found.sequences[:, :-1], min_token_index=2)[:, 5:]  # one pass: nothing to stop at
    torch.testing.assert_close(torch.stack(found.logits, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stopped.logits[0], found.logits[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(stopped.logits[1], whole[:, 1], atol=1e-2)


@pytest.mark.parametrize("kind", SITES)
def test_vectors_come_back_bit_for_bit(kind: str) -> None:
    model, vector = tiny_model(), theirs(kind=kind)
    back = to_steering_vectors(from_steering_vectors(vector, model))
    assert back.layer_type == kind
    assert back.layer_activations.keys() == vector.layer_activations.keys()
    assert all(torch.equal(back.layer_activations[layer], value) for layer, value in vector.layer_activations.items())
    ours = randomised(af.SteerVec.for_model(model, SITES[kind], [1]))
    assert torch.equal(from_steering_vectors(to_steering_vectors(ours), model).vectors, ours.vectors)


def test_half_precision_negative_layers_and_rows_are_taken() -> None:
    model = tiny_model()
    half = theirs((-1,), dtype=torch.bfloat16)
    half.layer_activations[-1] = half.layer_activations[-1].view(1, 32).requires_grad_()
    ours = from_steering_vectors(half, model)
    assert ours.location.layers == (1,)
    assert torch.equal(ours.vectors.flatten(), half.layer_activations[-1].detach().float().flatten())
    assert ours.vectors.requires_grad  # it can be learned on from there


@pytest.mark.parametrize("kind", ["input_layernorm", "post_attention_layernorm"])
def test_the_output_of_a_norm_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"vector: its layer_type is '{kind}', the output of a norm"):
        from_steering_vectors(theirs(kind=kind), tiny_model())


def test_vectors_of_another_model_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"layer 0: got vectors of shape \(8,\), expected \(1, 1, 32\) or \(32,\)"):
        from_steering_vectors(SteeringVector({0: torch.zeros(8)}), model)
    with pytest.raises(ValueError, match="layers: got 5, expected -2 to 1"):
        from_steering_vectors(theirs((5,)), model)
    with pytest.raises(ValueError, match="not finite"):
        from_steering_vectors(SteeringVector({0: torch.full((32,), torch.inf)}), model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: af.SteerVec.for_model(m, "head"),
            "its site is 'head'; steering-vectors only has residual, attn_out,",
        ),
        (lambda m: af.SteerVec.for_model(m, "residual", positions=[0]), "it has positions"),
        (lambda m: af.SteerVec.stack([af.SteerVec.for_model(m, "residual")] * 2), "got a stack of 2"),
    ],
)
def test_what_the_library_cannot_say_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"steer_vec: {message}"):
        to_steering_vectors(make(tiny_model()))


def test_ablation_there_is_a_projection_here() -> None:
    """What the module's text says of operators: ablating v is h − ⟨h, v̂⟩·v̂."""
    model, vector = tiny_model(), theirs()
    expected = steered(model, vector, operator=ablation_operator())
    ours = af.Projection.for_model(model, "residual")
    with torch.no_grad():
        for layer, value in vector.layer_activations.items():
            ours.directions[layer, 0, 0] = value / value.norm()
    with af.patch(model, ours):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.0")
    monkeypatch.delitem(sys.modules, "actscale_fast.integrations.steering_vectors")
    with pytest.raises(ImportError, match=r"got steering-vectors 0\.13\.0, expected steering-vectors>=0\.12\.2,<0\.13"):
        importlib.import_module("actscale_fast.integrations.steering_vectors")


def test_a_vector_at_a_module_that_a_path_names_is_refused() -> None:
    model = tiny_model("gemma2")
    vector = randomised(af.SteerVec.for_model(model, site="mlp_out", mlp="post_feedforward_layernorm"))
    with pytest.raises(ValueError, match="site 'mlp_out' is the module 'post_feedforward_layernorm', but"):
        to_steering_vectors(vector)
