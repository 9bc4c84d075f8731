"""Files that an earlier version wrote (commit f4424e7, whose modules had other names) are read as they were meant.

tests/data/saved holds them: of each class of intervention, an ActScaleModel, a finished fit's checkpoint and a sweep,
all for `model()` below and with the values of `filled`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import actscale_fast as af
from actscale_fast.patching.pretrained import ActScaleModel

SAVED = Path(__file__).resolve().parent.parent / "data" / "saved"
EXAMPLES = [
    af.Example("The capital of A is", "Paris", "Rome"),
    af.Example("The capital of B is", "Berlin", "Oslo"),
]


def model() -> Any:
    """A model whose weights are the same in every version of PyTorch."""
    made = tiny.llama(layers=2)
    with torch.no_grad():
        for weight in made.parameters():
            numbers = torch.arange(weight.numel(), dtype=torch.float64) * 0.6180339887
            weight.copy_((numbers % 1 - 0.5).view(weight.shape))
    return made


def filled(shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel()) % 8 * 0.125 - 0.5).view(shape)


@pytest.mark.parametrize("name", ["ActivScalar", "SteerVec", "DynScalar", "JoLA"])
def test_an_intervention_of_each_class_loads(name: str) -> None:
    loaded = af.load_intervention(SAVED / name)
    assert type(loaded).__name__ == name
    assert all(torch.equal(value, filled(value.shape)) for value in loaded.parameters())
    plain = model()
    with torch.no_grad(), af.patch(plain, loaded):
        assert plain(torch.tensor([[4, 5, 6, 7]])).logits.isfinite().all()


def test_a_composite_loads_with_its_factors() -> None:
    loaded = af.load_intervention(SAVED / "Composite")
    assert [(factor, type(part).__name__) for factor, part in loaded.pairs] == [
        (1.0, "ActivScalar"), (1.0, "Projection"),
    ]  # fmt: skip
    assert torch.equal(loaded.singles[0].alpha, 0.5 * filled(loaded.singles[0].alpha.shape))


def test_an_interchange_loads_with_its_rotation() -> None:
    loaded = af.load_intervention(SAVED / "BoundlessDAS")
    rotation = loaded.rotation
    assert rotation.shape == (1, 1, 4, 8, 8)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(8).expand_as(rotation), rtol=0, atol=1e-5)
    assert torch.equal(loaded.boundary, torch.full((1, 1, 4), 0.25))
    assert float(loaded.temperature) == 2.0


def test_an_actscale_model_loads_with_its_strength() -> None:
    loaded = ActScaleModel.from_pretrained(model(), SAVED / "ActScaleModel")
    assert loaded.strength == -0.5
    assert torch.equal(loaded.intervention.alpha, filled(loaded.intervention.alpha.shape))


def test_a_finished_fit_is_resumed_without_a_step(tmp_path: Path) -> None:
    path = Path(shutil.copy(SAVED / "fit.safetensors", tmp_path))
    plain = model()
    scalars = af.ActivScalar.for_model(plain, layers=[1])
    objective = af.Objective(minimality=0.12)  # that version's default
    result = af.fit(
        plain, tiny.tokenizer(), EXAMPLES, scalars, objective, steps=3, batch_size=2, checkpoint=path, progress=False
    )  # fmt: skip
    assert [record["step"] for record in result.history] == [0, 1, 2]
    assert torch.equal(scalars.alpha, load_file(SAVED / "fit.safetensors")["alpha"])
    assert path.read_bytes() == (SAVED / "fit.safetensors").read_bytes()


def test_a_sweep_loads_and_its_fits_are_not_repeated(tmp_path: Path) -> None:
    root = Path(shutil.copytree(SAVED / "sweep", tmp_path / "sweep"))
    (fit,) = af.load_sweep(root).fits
    assert (fit.label, len(fit.history), fit.evaluation.n_examples) == ("minimality=0.5", 2, 2)
    told = json.loads((root / "sweep.json").read_text())
    again = af.sweep(
        model(), tiny.tokenizer(), EXAMPLES, {"minimality": [0.5]}, folder=root, steps=2, batch_size=2,
        evaluate_on=EXAMPLES, progress=False,
    )  # fmt: skip
    assert again.fits[0].history == fit.history
    assert torch.equal(again.fits[0].intervention.alpha, fit.intervention.alpha)
    assert older(json.loads((root / "sweep.json").read_text())) == older(told)


def older(value: Any) -> Any:
    """The index of a sweep without the figures that evaluations of that version lack, and without its checksum."""
    if isinstance(value, dict):
        kept = {name: older(one) for name, one in value.items() if name != "checksum"}
        return {name: one for name, one in kept.items() if one not in (None, {})}
    return [older(one) for one in value] if isinstance(value, list) else value
