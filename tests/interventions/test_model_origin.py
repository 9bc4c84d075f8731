"""`intervention.json` names the model, and another fine-tune with the same shape is warned of, once."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from fit_cases import conflicts, run

import actscale_fast as af
from actscale_fast._json import read_sealed, write_sealed
from actscale_fast.architectures.model_origin import ModelOrigin, origin_of, public_name
from actscale_fast.architectures.weights_digest import weights_digest

WARNED = "made for a model of the same shape with other weights"


def fine_tuned(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.01
    return other


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "intervention.json").read_text(encoding="utf-8"))["model"]


def saved(model: Any, folder: Path) -> af.Intervention:
    scalars = af.ActivScalar.for_model(model)
    scalars.save_pretrained(folder)
    return af.load_intervention(folder)


def test_the_file_names_the_model(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config._name_or_path = "someone/a-model"
    loaded = saved(model, tmp_path)
    assert described(tmp_path) == {
        "name": "someone/a-model",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "weights": weights_digest(model),
        "transformers": transformers.__version__,
        "quantisation": "none",
    }
    assert loaded.location.origin == origin_of(model)


def test_another_fine_tune_is_warned_of_once(tmp_path: Path) -> None:
    model = tiny.llama()
    loaded, other = saved(model, tmp_path), fine_tuned(model)
    with pytest.warns(UserWarning, match=WARNED) as seen, af.patch(other, loaded):
        pass
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (other, model, copy.deepcopy(model)):
            af.patch(known, loaded).remove()
    with pytest.warns(UserWarning, match=WARNED):
        af.merge(fine_tuned(model), loaded)


@pytest.mark.parametrize("change", ["dtype", "class", "unknown", "meta", "transformers", "quantised"])
def test_weights_that_cannot_be_compared_are_not_warned_of(change: str, tmp_path: Path) -> None:
    model = tiny.llama()
    loaded, other = saved(model, tmp_path), fine_tuned(model)
    if change == "dtype":
        other.bfloat16()
    elif change == "class":
        other = other.model
    elif change == "meta":
        other.to("meta")
    elif change == "transformers":
        assert loaded.location.origin is not None
        loaded.set_origin(replace(loaded.location.origin, transformers="5.0.0"))
    elif change == "quantised":
        other.config.quantization_config = {"quant_method": "bitsandbytes", "_load_in_4bit": True}
        assert origin_of(other).quantisation == "bitsandbytes, 4 bits"
    else:
        loaded.location = replace(loaded.location, origin=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.patch(other, loaded).remove()


def test_the_warning_says_that_the_names_agree(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config._name_or_path = "someone/a-model"
    loaded = saved(model, tmp_path)
    with pytest.warns(UserWarning, match=r"\(the same name, other weights; someone/a-model, digest"):
        af.patch(fine_tuned(model), loaded)


def test_of_a_folder_only_the_last_component_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "a-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "a-model")
    given = [str(tmp_path / "home" / "a-model"), "../a-model/", ".", "/gone/a-model", "someone/a-model", "", None]
    assert [public_name(name) for name in given] == ["a-model"] * 4 + ["someone/a-model", None, None]


def test_a_refused_fit_leaves_the_origin(tmp_path: Path) -> None:
    model = tiny.llama()
    scalars = af.ActivScalar.for_model(model)
    scalars.set_origin(ModelOrigin("another"))
    state = tmp_path / "state"
    run(model, conflicts(4), steps=1, checkpoint=state)
    with pytest.raises(ValueError, match="checkpoint"):
        run(model, conflicts(4), af.Objective(margin=9.0), intervention=scalars, steps=1, checkpoint=state)
    assert scalars.location.origin == ModelOrigin("another")


def test_sums_multiples_and_stacks_keep_the_model(tmp_path: Path) -> None:
    model = tiny.llama()
    first, second = (af.ActivScalar.for_model(model, site=site) for site in ("head", "mlp_out"))
    (first + 2.0 * second).save_pretrained(tmp_path)
    loaded = af.load_intervention(tmp_path)
    assert [part.location.origin for part in loaded.singles] == [origin_of(model)] * 2
    assert af.stack([first, first]).location.origin == origin_of(model)


def test_what_is_learned_belongs_to_the_model_that_it_was_learned_on() -> None:
    model = tiny.llama()
    other = fine_tuned(model)
    scalars = af.ActivScalar.for_model(model)
    with pytest.warns(UserWarning, match=WARNED):
        run(other, conflicts(4), intervention=scalars, steps=1)
    assert scalars.location.origin == origin_of(other)


def test_files_without_the_model_load_and_bad_ones_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    saved(model, tmp_path)
    path = tmp_path / "intervention.json"
    told = read_sealed(path)
    del told["model"]
    write_sealed(path, told)
    assert af.load_intervention(tmp_path).location.origin is None
    for bad in (7, {"name": 7}, {"name": "x" * 5000}, {"unheard": "x"}):
        write_sealed(path, told | {"model": bad})
        with pytest.raises(ValueError, match=r"intervention\.json: damaged or not an intervention \(model: got"):
            af.load_intervention(tmp_path)


def test_locations_are_equal_whatever_model_they_were_made_for() -> None:
    location = af.ActivScalar.for_model(tiny.llama()).location
    assert location == replace(location, origin=ModelOrigin(name="other"))
    assert "origin" not in location.to_dict()
