"""Interventions as objects: locations that are checked, counts, stacks, and files that are whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_zoo import randomised, tiny_model
from torch import Tensor

from actscale_fast import _files
from actscale_fast._json import write_sealed
from actscale_fast.interventions import ActivScalar, Intervention, SteerVec, load_intervention
from actscale_fast.interventions.description import DESCRIPTION

IDS = torch.tensor([[5, 9, 12, 7, 30, 2]])


@pytest.mark.parametrize(
    ("cls", "arguments", "shape"),
    [
        (ActivScalar, {}, (2, 1, 4)),
        (ActivScalar, {"site": "mlp_out"}, (2, 1, 1)),
        (ActivScalar, {"layers": [-1], "positions": [0, -1, 2]}, (1, 3, 4)),
        (ActivScalar, {"positions": range(2), "generated": True}, (2, 3, 4)),
        (ActivScalar, {"positions": [], "generated": True}, (2, 1, 4)),
        (SteerVec, {}, (2, 1, 4, 10)),
        (SteerVec, {"site": "residual", "layers": (1,), "positions": [0, 1]}, (1, 2, 1, 32)),
    ],
)
def test_parameters_hold_the_chosen_layers_and_slots_and_start_as_the_identity(
    cls: type[Intervention], arguments: dict[str, object], shape: tuple[int, ...]
) -> None:
    intervention = cls.for_model(tiny_model("qwen3", dtype=torch.bfloat16), **arguments)  # type: ignore[arg-type]
    (parameter,) = intervention.parameters()
    assert (tuple(parameter.shape), parameter.dtype) == (shape, torch.float32)
    assert parameter.requires_grad
    assert not parameter.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"site": "heads"}, ValueError, "site: got 'heads', expected one of head, attn_out, mlp_out, residual"),
        ({"layers": [0, 2]}, ValueError, "layers: got 2, expected -2 to 1: the model has 2"),
        ({"layers": [-3]}, ValueError, "layers: got -3, expected -2 to 1"),
        ({"layers": [1, -1]}, ValueError, "layers: got 1 more than once"),
        ({"layers": []}, ValueError, "layers: got none, expected at least one"),
        ({"layers": "01"}, TypeError, "layers: got '01', expected None or an iterable of ints"),
        ({"layers": 1}, TypeError, "layers: got 1, expected None or an iterable of ints"),
        ({"layers": [0.5]}, TypeError, "layers: got 0.5 among them, expected ints"),
        ({"positions": [True]}, TypeError, "positions: got True among them, expected ints"),
        ({"positions": [0, -1, 0]}, ValueError, "positions: got 0 more than once"),
        ({"positions": []}, ValueError, "positions: got none, expected at least one"),
        ({"generated": True}, ValueError, "generated: got True with positions=None"),
    ],
)
def test_bad_locations_are_refused_by_name(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ActivScalar.for_model(tiny_model("llama"), **arguments)  # type: ignore[arg-type]


def test_layers_keep_the_callers_order() -> None:
    model = tiny_model("llama")
    forward, backward = (ActivScalar.for_model(model, layers=layers) for layers in ([0, 1], [-1, 0]))
    assert backward.location.layers == (1, 0)
    from actscale_fast.patching.patch import patch

    randomised(forward)
    with torch.no_grad():
        backward.alpha.copy_(forward.alpha.flip(0))
        with patch(model, forward):
            expected = model(IDS).logits
        with patch(model, backward):
            assert torch.equal(model(IDS).logits, expected)


def test_counts_see_exact_zeros() -> None:
    intervention = ActivScalar.for_model(tiny_model("llama"))
    with torch.no_grad():
        intervention.alpha[0, 0] = torch.tensor([0.5, -2.0, 0.0, 1e-30])
    assert (intervention.n_parameters, intervention.n_active) == (8, 3)
    assert intervention.l1 == pytest.approx(2.5)
    assert "site='head', layers=[0, 1], positions=all, model='llama'" in repr(intervention)


@pytest.mark.parametrize("cls", [ActivScalar, SteerVec])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_saved_intervention_comes_back_to_the_bit(cls: type[Intervention], stacked: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    intervention = randomised(
        cls.for_model(model, layers=[-1], positions=[0, -1], generated=True, projection="self_attn.o_proj")
    )
    if stacked:
        intervention = cls.stack([intervention, randomised(cls.for_model(model, **where(intervention)))])
    intervention.save_pretrained(tmp_path / "new" / "folder")
    made = tmp_path / "new" / "folder"
    assert {path.name for path in made.iterdir()} == {DESCRIPTION, tensors_in(made).name}
    for loaded in (
        load_intervention(tmp_path / "new" / "folder"),
        cls.from_pretrained(str(tmp_path / "new" / "folder")),
    ):
        assert type(loaded) is cls
        assert loaded.location == intervention.location
        assert loaded.n_groups == intervention.n_groups
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), intervention.parameters(), strict=True))
        assert torch.equal(loaded.wanted_positions, intervention.wanted_positions)


def where(intervention: Intervention) -> dict[str, object]:
    location = intervention.location
    return {
        "site": location.site,
        "layers": location.layers,
        "positions": location.positions,
        "generated": location.generated,
        **location.paths,
    }


def tensors_in(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """A change by somebody who makes the checksum agree."""

    def damage(folder: Path) -> None:
        description = json.loads((folder / DESCRIPTION).read_text())
        change(description)
        write_sealed(folder / DESCRIPTION, description)

    return damage


def truncated(pattern: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return damage


def flipped(folder: Path) -> None:
    content = bytearray(tensors_in(folder).read_bytes())
    content[-3] ^= 1
    tensors_in(folder).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: tensors_in(folder).unlink(), FileNotFoundError, r"intervention-\w+.safetensors: not found"),
        (lambda folder: (folder / DESCRIPTION).unlink(), FileNotFoundError, "intervention.json: not found"),
        (truncated("*.safetensors", 0.5), ValueError, r"intervention-\w+.safetensors: damaged or truncated"),
        (truncated("*.safetensors", 0), ValueError, r"intervention-\w+.safetensors: damaged or truncated"),
        (truncated(DESCRIPTION, 0.5), ValueError, "intervention.json: damaged or not an intervention"),
        (flipped, ValueError, r"intervention-\w+.safetensors: damaged or truncated"),
        (
            edited(lambda d: d.update({"class": "Unheard"})),
            ValueError,
            "unknown class 'Unheard', expected one of ActivScalar",
        ),
        (edited(lambda d: d.update({"format": 3})), ValueError, "format 3, this version reads 1 and 2"),
        (edited(lambda d: d.pop("location")), ValueError, "intervention.json: damaged"),
        (edited(lambda d: d["location"].update({"site": "nose"})), ValueError, "site: got 'nose'"),  # type: ignore[attr-defined]
        (edited(lambda d: d["location"].update({"layers": [7]})), ValueError, "layers: got 7, expected -2 to 1"),  # type: ignore[attr-defined]
        (edited(lambda d: d["location"].update({"layers": [0]})), ValueError, "holds tensors .*expected"),  # type: ignore[attr-defined]
        (edited(lambda d: d["location"]["model"].update({"n_heads": -1})), ValueError, "model: got"),  # type: ignore[index]
        (edited(lambda d: d.update({"n_groups": 0})), ValueError, "n_groups: got 0"),
        (lambda folder: (folder / DESCRIPTION).write_text("[1]"), ValueError, "a JSON list, expected an object"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    randomised(ActivScalar.for_model(tiny_model("llama"))).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_intervention(tmp_path)


def test_a_file_of_another_class_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    ActivScalar.for_model(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds ActivScalar, expected SteerVec"):
        SteerVec.from_pretrained(tmp_path)
    assert isinstance(Intervention.from_pretrained(tmp_path), ActivScalar)
    with pytest.raises(FileNotFoundError, match="expected a folder written by save_pretrained"):
        load_intervention(tmp_path / "nothing")


def test_non_finite_parameters_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load_file, save_file

    intervention = ActivScalar.for_model(tiny_model("llama"))
    intervention.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        intervention.alpha[0, 0, 1:3] = float("inf")
    with pytest.raises(ValueError, match="alpha: 2 of 8 values are not finite"):
        intervention.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    tensors: dict[str, Tensor] = load_file(tensors_in(tmp_path))
    tensors["alpha"][0] = float("nan")
    save_file(tensors, tensors_in(tmp_path))
    digest = hashlib.sha256(tensors_in(tmp_path).read_bytes()).hexdigest()
    name = f"intervention-{digest[:16]}.safetensors"
    tensors_in(tmp_path).rename(tmp_path / name)
    edited(lambda d: d.update({"tensors": {"file": name, "sha256": digest}}))(tmp_path)
    with pytest.raises(ValueError, match="alpha: 4 of 8 values are not finite"):
        load_intervention(tmp_path)


def test_a_save_that_fails_leaves_the_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intervention = ActivScalar.for_model(tiny_model("llama"))
    intervention.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        randomised(intervention).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_stacks_need_one_class_and_one_site() -> None:
    model = tiny_model("llama")
    one, other = ActivScalar.for_model(model), ActivScalar.for_model(model, site="mlp_out")
    assert tuple(ActivScalar.stack([one, one, one]).alpha.shape) == (3, 2, 1, 4)
    with pytest.raises(ValueError, match="sites 'head' and 'mlp_out'"):
        ActivScalar.stack([one, other])
    for wrong in ([], [one, SteerVec.for_model(model)], [ActivScalar.stack([one])]):
        with pytest.raises(ValueError, match=r"expected (unstacked ones of one class|ActivScalar alone)"):
            ActivScalar.stack(wrong)


def test_importing_the_package_imports_neither_transformers_nor_pytorchs_compiler() -> None:
    import subprocess
    import sys

    code = (
        "import sys, actscale_fast as af; af.patch, af.fit, af.evaluate, af.load_intervention; "
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_an_intervention_is_made_where_only_its_own_package_was_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, 'tests/helpers'); from model_zoo import tiny_model; "
        "from actscale_fast.interventions import ActivScalar; print(ActivScalar.for_model(tiny_model()).n_parameters)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "8", done.stderr
