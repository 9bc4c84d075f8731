"""Defaults mean the same on a model that computes the same function with ten times larger activations."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import OBJECTIVE, conflicts, interrupted_at, run
from torch import Tensor

import actscale_fast as af
from actscale_fast import defaults
from actscale_fast.learning.activation_size import activation_sizes
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.fit_settings import FitSettings

KINDS = pytest.mark.parametrize(("kind", "power"), [("ActivScalar", 0), ("SteerVec", 1), ("DynScalar", -1)])


def enlarged(*factors: float) -> Any:
    """The tiny model with other activations at the head site, by a factor for each layer, and the same logits."""
    model = tiny.llama()
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, factors, strict=True):
            layer.self_attn.v_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.div_(factor)
    return model


def fitted(model: Any, kind: str, objective: af.Objective | None = None, **options: Any) -> af.FitResult:
    where = {name: options.pop(name) for name in ("site", "positions", "layers") if name in options}
    intervention = getattr(af, kind).for_model(model, **where)
    return af.fit(model, tiny.tokenizer(), conflicts(20), intervention, objective, progress=False, **options)


def values(result: af.FitResult) -> Tensor:
    (parameter,) = result.intervention.parameters()
    return parameter.detach()


def sizes_by_hooks(model: Any, examples: list[af.Example], positions: list[int] | None = None) -> list[float]:
    """The median over tokens of the RMS of what each o_proj receives, from one plain pass per prompt."""
    seen: dict[int, list[Tensor]] = {}
    for layer, module in enumerate(model.model.layers):
        module.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.setdefault(layer, []).append(args[0][0].double())
        )
    tokenizer = tiny.tokenizer()
    for example in examples:
        with torch.no_grad():
            model(**tokenizer(example.prompt, return_tensors="pt"))
    chosen = {layer: [x if positions is None else x[positions] for x in found] for layer, found in seen.items()}
    return [float(torch.cat(found).square().mean(-1).sqrt().median()) for found in chosen.values()]


@KINDS
def test_defaults_hold_for_ten_times_larger_activations(kind: str, power: int) -> None:
    one = fitted(enlarged(1, 1, 1), kind, steps=10)
    ten = fitted(enlarged(10, 10, 10), kind, steps=10)
    assert one.intervention.n_active == ten.intervention.n_active > 0
    smallest = 1e-4 * float(values(one).abs().max())
    torch.testing.assert_close(values(ten) / 10.0**power, values(one), rtol=1e-3, atol=smallest)
    for name in ("effectiveness", "faithfulness"):
        assert ten.history[-1][name] == pytest.approx(one.history[-1][name], rel=1e-4)
    assert one.history[-1]["effectiveness"] < 0.95 * one.history[0]["effectiveness"]


@KINDS
def test_a_rates_share_holds_for_every_layer_by_itself(kind: str, power: int) -> None:
    factors = torch.tensor([0.1, 1.0, 30.0])
    without_l1 = af.Objective(minimality=0.0)
    plain = fitted(enlarged(1, 1, 1), kind, without_l1, steps=6)
    other = fitted(enlarged(*factors.tolist()), kind, without_l1, steps=6)
    back = values(other) / (factors**power).view(-1, *[1] * (values(other).dim() - 1))
    torch.testing.assert_close(back, values(plain), rtol=1e-3, atol=1e-4 * float(values(plain).abs().max()))


@pytest.mark.parametrize("positions", [None, [-1, 0]])
def test_the_first_step_is_the_share_of_the_activations_median_size(positions: list[int] | None) -> None:
    first = {"steps": 1, "schedule": "constant", "lr": "2%", "positions": positions}
    sizes = torch.tensor(sizes_by_hooks(tiny.llama(), conflicts(20), positions))
    data = EncodedExamples(conflicts(20), tiny.tokenizer(), tiny.llama())
    vectors = af.SteerVec.for_model(tiny.llama(), positions=positions)
    (measured,) = activation_sizes(tiny.llama(), data, vectors, range(20))
    assert measured is not None
    torch.testing.assert_close(measured.double(), sizes.double(), rtol=1e-5, atol=0)
    for kind, unit in (("SteerVec", sizes), ("DynScalar", 1 / (8 * sizes)), ("ActivScalar", torch.ones(3))):
        moved = values(fitted(tiny.llama(), kind, af.Objective(minimality=0.0), **first)).abs().flatten(1)
        torch.testing.assert_close(moved.amax(1).double(), 0.02 * unit.double(), rtol=1e-4, atol=0)


def test_a_share_is_a_number_for_factors() -> None:
    share, number = (fitted(tiny.llama(), "ActivScalar", OBJECTIVE, steps=4, lr=lr) for lr in ("5%", 0.05))
    assert torch.equal(values(share), values(number))
    assert share.history == number.history
    assert FitSettings().for_intervention(share.intervention) == FitSettings(lr=0.05)
    vectors = af.SteerVec.for_model(tiny.llama())
    assert FitSettings().for_intervention(vectors) == FitSettings()
    assert FitSettings(lr=" 5 %") == FitSettings(lr="5%")


def test_each_part_of_a_sum_has_its_own_steps() -> None:
    model = tiny.llama()
    parts = af.ActivScalar.for_model(model, site="mlp_out") + af.SteerVec.for_model(model)
    found = run(model, conflicts(9), af.Objective(minimality=0.0), intervention=parts, steps=1, lr="5%")
    scalars, vectors = (next(part.parameters()).detach() for part in found.intervention.singles)
    assert float(scalars.abs().max()) == pytest.approx(0.05, rel=1e-4)
    expected = 0.05 * torch.tensor(sizes_by_hooks(tiny.llama(), conflicts(9)))
    torch.testing.assert_close(vectors.abs().flatten(1).amax(1), expected, rtol=1e-4, atol=0)


def test_parts_at_modules_of_one_site_have_sizes_of_their_own() -> None:
    model = tiny.llama()
    parts = [af.SteerVec.for_model(model, "mlp_out", mlp=path) for path in ("mlp", "self_attn.o_proj")]
    data = EncodedExamples(conflicts(6), tiny.tokenizer(), model, {})
    alone = [activation_sizes(model, data, part, range(6))[0] for part in parts]
    together = activation_sizes(model, data, parts[0] + parts[1], range(6))
    for one, other in zip(alone, together, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert not torch.allclose(*alone, rtol=0.1)  # type: ignore[arg-type]


def test_a_resumed_fit_keeps_the_sizes_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.safetensors"
    whole = fitted(tiny.llama(), "SteerVec", steps=6)
    with interrupted_at(3):
        fitted(tiny.llama(), "SteerVec", steps=6, checkpoint=path)
    with monkeypatch.context() as context:  # nothing is measured again
        context.setattr(importlib.import_module("actscale_fast.learning.fit"), "activation_sizes", None)
        resumed = fitted(tiny.llama(), "SteerVec", steps=6, checkpoint=path)
    assert torch.equal(values(resumed), values(whole))
    assert resumed.history == whole.history
    with pytest.raises(ValueError, match="belongs to another fit: lr"):
        fitted(tiny.llama(), "SteerVec", steps=6, checkpoint=path, lr=0.05)


def test_a_checkpoint_of_scalars_with_a_number_is_one_with_the_share(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    before = run(tiny.llama(), conflicts(9), OBJECTIVE, checkpoint=path, lr=0.05)
    assert run(tiny.llama(), conflicts(9), OBJECTIVE, checkpoint=path, lr="5%").history == before.history


@pytest.mark.parametrize("kind", ["SteerVec", "DynScalar"])
def test_a_sweep_by_defaults_is_its_single_fits(kind: str, tmp_path: Path) -> None:
    model = tiny.llama()
    grid: dict[str, Any] = {"lr": ["5%", 0.01], "minimality": ["default", "2%"]}
    start, options = getattr(af, kind).for_model(model), {"steps": 4, "progress": False}
    sweep = af.sweep(model, tiny.tokenizer(), conflicts(20), grid, intervention=start, folder=tmp_path, **options)
    for fit in sweep.fits:
        objective = af.Objective(minimality=fit.chosen["minimality"])
        alone = fitted(model, kind, objective, steps=4, lr=fit.chosen["lr"])
        (found,) = fit.intervention.parameters()
        # λ_max is rounded to four digits before or after the share is taken of it.
        torch.testing.assert_close(found, values(alone), rtol=1e-3, atol=1e-3 * float(values(alone).abs().max()))
        assert fit.settings["lr"] == fit.chosen["lr"]
    again = af.load_sweep(tmp_path)
    assert [fit.settings for fit in again.fits] == [fit.settings for fit in sweep.fits]


def test_the_default_weight_depends_on_what_is_learned() -> None:
    model, default = tiny.llama(), af.Objective()
    for kind, weight in (("ActivScalar", "5%"), ("SteerVec", "0.3%"), ("DynScalar", "0.3%"), ("Projection", 0.12)):
        assert default.for_intervention(getattr(af, kind).for_model(model)).minimality == weight
    assert (defaults.MINIMALITY, defaults.VECTOR_MINIMALITY, defaults.NUMBER_MINIMALITY) == ("5%", "0.3%", 0.12)
    scalars, vectors = af.ActivScalar.for_model(model), af.SteerVec.for_model(model)
    assert default.for_intervention(scalars + af.ActivScalar.for_model(model, site="mlp_out")).minimality == "5%"
    assert default.for_intervention(scalars + vectors).minimality == "0.3%"
    produced = replace(default, sparsity="scalars")
    assert produced.for_intervention(af.DynScalar.for_model(model)).minimality == produced.minimality_weight == 0.12
    for given in (0.5, "7%"):
        assert af.Objective(minimality=given).for_intervention(vectors).minimality == given
    with pytest.raises(ValueError, match="minimality: got 'default', expected a number here; call for_intervention"):
        _ = default.minimality_weight


def test_rates_that_mean_nothing_are_refused() -> None:
    for bad in ("5", "0%", "101%", "-5%", "fast", "nan%"):
        with pytest.raises(ValueError, match=rf"lr: got '{bad}', expected a positive number, or a share of the activ"):
            FitSettings(lr=bad)


def test_a_site_of_zeros_has_no_size() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    moved = values(fitted(model, "SteerVec", af.Objective(minimality=0.0), site="mlp_out", steps=1, lr="1%"))
    step = moved.abs().flatten(1).amax(1).tolist()
    assert step[1] == pytest.approx(min(step[0], step[2]))  # the lower median of the others
    with pytest.raises(ValueError, match="lr: the activation at site 'mlp_out' is 0 in every layer"):
        fitted(model, "SteerVec", af.Objective(minimality=0.0), site="mlp_out", layers=[1])
    fitted(model, "SteerVec", af.Objective(minimality=0.0), site="mlp_out", layers=[1], lr=0.01, steps=1)
    with pytest.raises(ValueError, match="share of for the default lr='5%'; pass a number"):
        fitted(model, "SteerVec", af.Objective(minimality=0.0), site="mlp_out", layers=[1])
    with pytest.raises(ValueError, match="share of for lr='1%'; pass a number"):
        fitted(model, "SteerVec", af.Objective(minimality=0.0), site="mlp_out", layers=[1], lr="1%")


def test_a_point_of_a_sweep_at_a_site_of_zeros_does_not_stop_the_others() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    starts = [af.SteerVec.for_model(model, site="mlp_out", layers=[layer]) for layer in (1, 2)]
    options: dict[str, Any] = {"steps": 2, "progress": False}
    with pytest.warns(UserWarning, match=r"start=0: lr: the activation at site 'mlp_out' is 0 .*; the other fits cont"):
        dead, alive = af.sweep(model, tiny.tokenizer(), conflicts(20), starts, **options).fits
    assert dead.error is not None
    assert "the default lr='5%'" in dead.error
    assert not dead.history
    assert alive.error is None
    assert len(alive.history) == 2
    grid = {"layers": [[1]], "lr": ["2%"]}
    with pytest.raises(ValueError, match=r"grid: layers=1, lr=2%: lr: the activation .* for lr='2%'; pass a number"):
        af.sweep(model, tiny.tokenizer(), conflicts(20), grid, intervention=starts[0], **options)


def test_sizes_are_measured_in_smaller_passes_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny.llama(), conflicts(20)
    data, vectors = EncodedExamples(examples, tiny.tokenizer(), model), af.SteerVec.for_model(model)
    (expected,) = activation_sizes(model, data, vectors, range(20))
    forward, seen, most = model.model.layers[0].forward, [], 2

    def limited(hidden: Tensor, *args: Any, **keywords: Any) -> Any:
        seen.append(len(hidden))
        if len(hidden) > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(hidden, *args, **keywords)

    monkeypatch.setattr(model.model.layers[0], "forward", limited)
    (found,) = activation_sizes(model, data, vectors, range(20))
    assert seen[:3] == [16, 8, 4]
    torch.testing.assert_close(found, expected)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        activation_sizes(model, data, vectors, range(20))
    assert seen[-1] == 1
