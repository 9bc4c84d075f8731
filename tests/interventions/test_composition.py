"""Sums, multiples and stacks of interventions: what nested patches and rows of their own would do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import TokenExamples, assert_equal_to_rounding, engine, full
from model_zoo import randomised, tiny_model
from torch import Tensor

import actscale_fast as af
from actscale_fast._json import write_sealed
from actscale_fast.interventions import Composite, Intervention

IDS = torch.tensor([[5, 9, 12, 7, 30, 2], [8, 8, 41, 3, 19, 60]])


def steered(model: Any, parts: Sequence[tuple[Intervention, float]], ids: Tensor = IDS) -> Tensor:
    """The logits under nested patches."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for part, strength in parts:
            stack.enter_context(af.patch(model, part, strength=strength))
        return model(ids).logits


def patched(model: Any, whole: Intervention, strength: Any = 1.0, group: Tensor | None = None) -> Tensor:
    with torch.no_grad(), af.patch(model, whole, strength=strength, group=group):
        return model(IDS).logits


def some(model: Any) -> dict[str, Intervention]:
    return {
        "scalars": randomised(af.ActivScalar.for_model(model), 1, 0.5),
        "other scalars": randomised(af.ActivScalar.for_model(model, layers=[1]), 2, 0.5),
        "vector": randomised(af.SteerVec.for_model(model, site="residual", layers=[0]), 3, 0.3),
        "probes": randomised(af.DynScalar.for_model(model, site="mlp_out"), 4, 0.2),
        "projection": randomised(af.Projection.for_model(model, site="residual", layers=[1]), 5, 0.2),
    }


@pytest.mark.parametrize("first", ["scalars", "vector", "probes", "projection"])
@pytest.mark.parametrize("second", ["other scalars", "vector", "probes", "projection"])
def test_a_sum_does_what_nested_patches_do(first: str, second: str) -> None:
    model = tiny_model("llama")
    a, b = some(model)[first], some(model)[second]
    for strength in (1.0, -0.5):
        expected = steered(model, [(a, strength), (b, strength)])
        torch.testing.assert_close(patched(model, a + b, strength), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["scalars", "vector", "probes", "projection"])
def test_a_multiple_is_the_same_at_another_strength(name: str) -> None:
    model = tiny_model("llama")
    part = some(model)[name]
    for whole in (0.3 * part, part * 0.3, -(-0.3 * part)):
        torch.testing.assert_close(patched(model, whole, 2.0), patched(model, part, 0.6), rtol=1e-5, atol=1e-5)


def test_two_scales_of_one_head_multiply() -> None:
    model = tiny_model("llama")
    a, b = some(model)["scalars"], some(model)["scalars"]
    once = af.ActivScalar.for_model(model)
    with torch.no_grad():
        once.alpha.copy_((1 + a.alpha) * (1 + b.alpha) - 1)  # type: ignore[arg-type]
    torch.testing.assert_close(patched(model, a + b), patched(model, once), rtol=1e-5, atol=1e-5)


def test_vectors_at_one_site_add_up_to_a_vector_where_their_positions_can_stand_together() -> None:
    model = tiny_model("llama")
    short = randomised(af.SteerVec.for_model(model, site="residual", layers=[0], positions=[0, 1]), 1)
    longer = randomised(af.SteerVec.for_model(model, site="residual", layers=[1, 0], positions=[0, 1, 2]), 2)
    total = short + longer
    assert isinstance(total, af.SteerVec)
    assert (total.location.layers, total.location.positions) == ((0, 1), (0, 1, 2))
    torch.testing.assert_close(patched(model, total), steered(model, [(short, 1), (longer, 1)]), rtol=1e-4, atol=1e-5)
    last = randomised(af.SteerVec.for_model(model, site="residual", layers=[0], positions=[-1]), 3)
    one_token = IDS[:, :1]  # position 0 is position −1 here: each adds its own
    both = short + last
    assert isinstance(both, Composite)
    with torch.no_grad(), af.patch(model, both):
        found = model(one_token).logits
    torch.testing.assert_close(found, steered(model, [(short, 1), (last, 1)], one_token), rtol=1e-5, atol=1e-5)
    difference = short - short
    assert isinstance(difference, af.SteerVec)
    assert difference.n_active == 0


def test_the_handle_of_a_composite_changes_its_strength_and_leaves_no_trace() -> None:
    model = tiny_model("gpt2")
    parts = some(model)
    whole = 2.0 * (parts["scalars"] + 0.5 * parts["projection"])
    before, names = patched(model, parts["scalars"], 0.0), set(model.__dict__)
    with torch.no_grad(), af.patch(model, whole) as handle:
        handle.strength = torch.tensor([0.25, -1.0])
        rows = model(IDS).logits
        handle.strength = 0.0
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
        handle.remove()
        assert torch.equal(model(IDS).logits, before)
    for row, strength in enumerate((0.25, -1.0)):
        expected = steered(model, [(parts["scalars"], 2 * strength), (parts["projection"], strength)])
        torch.testing.assert_close(rows[row], expected[row], rtol=1e-5, atol=1e-5)
    assert set(model.__dict__) == names


def test_a_composite_of_another_model_is_refused_and_leaves_nothing_behind() -> None:
    model, other = tiny_model("llama"), tiny.llama()
    whole = some(model)["scalars"] + some(model)["projection"]
    before = set(other.model.layers[0].__dict__)
    with pytest.raises(ValueError, match="made for another model"):
        af.patch(other, whole)
    assert set(other.model.layers[0].__dict__) == before
    with pytest.raises(ValueError, match="made for another model"):
        some(model)["scalars"] + af.ActivScalar.for_model(other)


def test_a_saved_composite_steers_the_same_and_replaces_what_stood_there(tmp_path: Path) -> None:
    model = tiny_model("llama")
    parts = some(model)
    (tmp_path / "part-time").mkdir()
    (parts["scalars"] + parts["vector"] + parts["probes"]).save_pretrained(tmp_path)
    whole = parts["scalars"] + -0.5 * parts["projection"]
    whole.save_pretrained(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert (made[0], made[-1], len(made)) == ("intervention.json", "part-time", 4)
    loaded = af.load_intervention(tmp_path)
    assert isinstance(loaded, Composite)
    assert loaded.factors == (1.0, -0.5)
    assert torch.equal(patched(model, loaded, 0.7), patched(model, whole, 0.7))
    parts["other scalars"].save_pretrained(tmp_path / made[1])
    with pytest.raises(ValueError, match=rf"{made[1]}/intervention\.json: damaged, its checksum"):
        af.load_intervention(tmp_path)
    parts["scalars"].save_pretrained(tmp_path)
    assert isinstance(af.load_intervention(tmp_path), af.ActivScalar)
    description = json.loads((tmp_path / "intervention.json").read_text())
    for parts_listed in ([{}], [], None, [{"folder": "..", "factor": 1.0, "sha256": "0" * 64}]):
        changed = {"format": 2, "class": "Composite", "parts": parts_listed}
        write_sealed(tmp_path / "intervention.json", changed)
        with pytest.raises(ValueError, match=r"intervention\.json: damaged or not an intervention \(parts"):
            af.load_intervention(tmp_path)
    (tmp_path / "intervention.json").write_text(json.dumps(description | {"class": "Composite"}))
    with pytest.raises(ValueError, match="damaged or not an intervention"):
        af.load_intervention(tmp_path)


def test_a_merged_composite_is_the_patched_one() -> None:
    model = tiny_model("gpt2")  # its projections have biases
    parts = [
        randomised(af.ActivScalar.for_model(model), 1, 0.5),
        randomised(af.SteerVec.for_model(model, site="attn_out"), 2, 0.5),
        randomised(af.ActivScalar.for_model(model, site="attn_out"), 3, 0.5),
        randomised(af.ActivScalar.for_model(model, layers=[0]), 4, 0.5),
    ]
    whole = parts[0] + parts[1] + parts[2] + 0.5 * parts[3]
    before, expected = patched(model, whole, 0.0), patched(model, whole, -1.5)
    af.merge(model, whole, strength=-1.5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        af.unmerge(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Projection depends on the activation"):
        af.merge(model, parts[0] + randomised(af.Projection.for_model(model, site="attn_out")))


@pytest.mark.parametrize("cls", [af.ActivScalar, af.SteerVec, af.Projection])
def test_a_stack_joins_layers_and_positions_and_serves_each_row_its_own(cls: type[Intervention]) -> None:
    model = tiny_model("llama")
    parts = [
        randomised(cls.for_model(model, layers=[1], positions=[0, 2]), 1, 0.4),
        randomised(cls.for_model(model, layers=[0], positions=[1], generated=True), 2, 0.4),
    ]
    stacked = af.stack(parts)
    assert stacked.location.layers == (0, 1)
    assert (stacked.location.positions, stacked.location.generated) == ((0, 1, 2), True)
    found = patched(model, stacked, group=torch.tensor([1, 0]))
    for row, part in enumerate(reversed(parts)):
        torch.testing.assert_close(found[row], patched(model, part)[row], rtol=1e-4, atol=1e-5)


def test_places_that_cannot_stand_in_one_table_are_refused() -> None:
    model = tiny_model("llama")
    every, first, last = (af.ActivScalar.for_model(model, positions=positions) for positions in (None, [0], [-1]))
    with pytest.raises(ValueError, match="some steer every token and some listed positions"):
        af.stack([every, first])
    with pytest.raises(ValueError, match="counted from both ends"):
        af.stack([first, last])
    with pytest.raises(ValueError, match="their positions differ, but this class shares its parameters"):
        af.stack([af.DynScalar.for_model(model, positions=[0]), af.DynScalar.for_model(model, positions=[1])])
    with pytest.raises(ValueError, match="a Composite cannot be stacked"):
        af.stack([every + first, every + first])


def test_multiples_and_sums_of_what_is_not_learned_are_not_learned() -> None:
    model = tiny_model("llama")
    fixed = some(model)["vector"].requires_grad_(False)
    assert not any(value.requires_grad for value in (2.0 * fixed).parameters())
    learned = some(model)["vector"]
    assert [value.requires_grad for value in (fixed + learned).parameters()] == [False, True]


def test_what_is_no_sum_or_multiple_is_refused_by_name() -> None:
    model = tiny_model("llama")
    scalars = af.ActivScalar.for_model(model)
    with pytest.raises(TypeError, match="interventions: got int, expected an Intervention"):
        scalars + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="factor: got str, expected a number"):
        scalars * "2"  # type: ignore[operator]
    with pytest.raises(ValueError, match="factor: got nan, expected a finite number"):
        float("nan") * scalars
    with pytest.raises(ValueError, match="parts: got none"):
        Composite([])
    stacked = af.stack([scalars, scalars])
    with pytest.raises(ValueError, match="expected one number of row groups"):
        Composite([(1.0, scalars), (1.0, stacked)])
    with pytest.raises(TypeError, match="a Composite of 2 has no single location"):
        _ = (scalars + scalars).location


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("positions", [None, [-2, -1]])
def test_the_sites_of_a_composite_are_learned_together(family: str, positions: list[int] | None) -> None:
    """Gradients of a step against the full computation; SteerVec and the lower site are 0, where directions share."""
    model, data = tiny_model(family), TokenExamples()
    whole = Composite(
        [
            (1.0, af.SteerVec.for_model(model, site="attn_out", layers=[0], positions=positions)),
            (1.0, randomised(af.ActivScalar.for_model(model, site="mlp_out", layers=[1], positions=positions), 1, 0.3)),
            (-0.5, randomised(af.ActivScalar.for_model(model, layers=[1], positions=positions), 2, 0.3)),
        ]
    )
    objective = af.Objective(margin=3.0, faithfulness=0.7)
    assert_equal_to_rounding(engine(model, data, whole, objective), full(model, data, whole, objective), 5e-6)


def test_a_composite_is_fitted_evaluated_and_resumed(tmp_path: Path) -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    examples = [af.Example("The capital of A is", " Rome", " Oslo"), af.Example("what is B", " Paris", " one")]

    def both() -> Intervention:
        return af.ActivScalar.for_model(model, site="attn_out") + af.ActivScalar.for_model(model, site="mlp_out")

    options: dict[str, Any] = {"lr": 0.1, "progress": False, "schedule": "constant"}
    whole, resumed = both(), both()
    file = tmp_path / "fit.safetensors"
    history = af.fit(model, tokens, examples, whole, steps=20, checkpoint=file, **options).history
    assert af.fit(model, tokens, examples, resumed, steps=20, checkpoint=file, **options).history == history
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    elsewhere = af.ActivScalar.for_model(model, site="attn_out") + af.ActivScalar.for_model(model, site="residual")
    with pytest.raises(ValueError, match="location"):
        af.fit(model, tokens, examples, elsewhere, steps=20, checkpoint=file, **options)
    evaluation = af.evaluate(model, tokens, examples, whole)
    assert evaluation.baseline is not None
    assert evaluation.logit_difference > evaluation.baseline.logit_difference
    assert evaluation.n_scalars == 6
    with pytest.raises(TypeError, match="Composite is not supported here; pass one of its parts"):
        af.sweep(model, tokens, examples, {"seed": [0]}, intervention=whole, progress=False)


def test_a_composite_generates_with_padding_and_cache_as_nested_patches_do() -> None:
    model, tokens = tiny.llama(), tiny.tokenizer()
    a = randomised(af.SteerVec.for_model(model, site="residual", layers=[0], positions=[0, 1]), 1)
    b = randomised(af.ActivScalar.for_model(model, positions=[-1], generated=True), 2)
    batch = tokens(["The capital of A is", "what is"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        with af.patch(model, a), af.patch(model, b):
            expected = model.generate(**batch, **options)
        with af.patch(model, a + b):
            assert torch.equal(model.generate(**batch, **options), expected)
