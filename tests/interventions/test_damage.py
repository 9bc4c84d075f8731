"""Files that cannot lie: what was changed is an error that names a file; a killed save loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import damage
import pytest
import torch
from fit_cases import conflicts, run
from model_zoo import randomised, tiny_model

import actscale_fast as af
from actscale_fast import _files
from actscale_fast._json import parsed, read_sealed, write_sealed
from actscale_fast.learning import checkpoint
from actscale_fast.learning.sweep import fit_folder
from actscale_fast.patching.pretrained import ActScaleModel

SEED = 11


def test_no_corruption_is_silent_and_every_error_names_a_file(tmp_path: Path) -> None:
    found = damage.corruptions(280, SEED, tmp_path)
    assert (found["silent"], found["unnamed"]) == (0, 0)
    assert found["found"] > 220


def test_a_killed_save_leaves_the_old_or_the_new_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    found = damage.kills(12, SEED, tmp_path)
    assert found["whole"] == 12
    assert found["not cleaned up"] == 0


@pytest.mark.parametrize("kind", damage.kinds(), ids=lambda kind: kind.name)
def test_every_byte_of_every_file_counts(kind: damage.Kind, tmp_path: Path) -> None:
    kind.write(tmp_path, 0)
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(len(whole) // 12, 1)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises((ValueError, FileNotFoundError), match=r"\.(json|safetensors)"):
                kind.read(tmp_path)
        for changed in (whole[:-1], whole + b"\n", b""):
            path.write_bytes(changed)
            with pytest.raises((ValueError, FileNotFoundError), match=r"\.(json|safetensors)"):
                kind.read(tmp_path)
        path.write_bytes(whole)
    kind.read(tmp_path)


def test_an_older_save_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("Composite", "DAS", "ActivScalar", "SteerVec", "Composite", "SteerVec"):
        damage.interventions(0)[name].save_pretrained(tmp_path)
        made = damage.interventions(1)[name]
        made.save_pretrained(tmp_path)
        assert damage.contents(af.load_intervention(tmp_path)) == damage.contents(made)
        tensors = {path.name for path in tmp_path.glob("*.safetensors")}
        parts = {path.name for path in tmp_path.glob("part-*")}
        assert (len(tensors), len(parts)) == ((0, 2) if name == "Composite" else (1, 0))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_parts_that_are_one_object_stay_one_and_equal_ones_stay_two(tmp_path: Path) -> None:
    model = tiny_model("llama")
    one, other, equal = (af.ActivScalar.for_model(model) for _ in range(3))
    randomised(other)
    whole = one + 0.5 * other.requires_grad_(True) + one
    (whole + equal).save_pretrained(tmp_path)
    parts = [part for _, part in af.load_intervention(tmp_path).pairs]
    assert len({id(part) for part in parts}) == 3
    assert parts[0] is parts[2]
    assert parts[3] is not parts[0]


def test_saves_of_the_first_format_still_load(tmp_path: Path) -> None:
    import hashlib
    import json

    from safetensors.torch import save

    def written(folder: Path, one: af.ActivScalar) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        payload = save({"alpha": one.alpha.detach()})
        (folder / "intervention.safetensors").write_bytes(payload)
        told = {
            "format": 1, "class": "ActivScalar", "module": "actscale_fast.interventions.scalar", "n_groups": None,
            "location": one.location.to_dict(), "sha256": hashlib.sha256(payload).hexdigest(),
        }  # fmt: skip
        (folder / "intervention.json").write_text(json.dumps(told, indent=1))
        return hashlib.sha256((folder / "intervention.json").read_bytes()).hexdigest()

    made = [randomised(af.ActivScalar.for_model(tiny_model("llama")), seed) for seed in (1, 2)]
    written(tmp_path / "one", made[0])
    assert torch.equal(af.load_intervention(tmp_path / "one").alpha, made[0].alpha)
    parts = []
    for index, part in enumerate(made):
        digest = written(tmp_path / "two" / f"part-{index}", part)
        parts.append({"folder": f"part-{index}", "factor": 0.5, "sha256": digest})
    told = {"format": 1, "class": "Composite", "parts": parts}
    (tmp_path / "two" / "intervention.json").write_text(json.dumps(told))
    loaded = af.load_intervention(tmp_path / "two")
    assert [factor for factor, _ in loaded.pairs] == [0.5, 0.5]
    assert torch.equal(loaded.singles[1].alpha, made[1].alpha)
    (tmp_path / "one" / "actscale_config.json").write_text('{"strength": -0.5, "base_model_name_or_path": null}')
    assert ActScaleModel.from_pretrained(tiny_model("llama"), tmp_path / "one").strength == -0.5
    made[1].save_pretrained(tmp_path / "two")
    assert len(list(tmp_path.glob("two/*"))) == 2
    (tmp_path / "one" / "intervention.json").write_text(json.dumps({**told, "format": 1, "more": 1}))
    with pytest.raises(ValueError, match=r"intervention\.json: damaged .*unknown"):
        af.load_intervention(tmp_path / "one")


def test_the_strength_is_saved_with_the_intervention(tmp_path: Path) -> None:
    model = ActScaleModel(tiny_model("llama"), af.ActivScalar.for_model(tiny_model("llama")), strength=0.25)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "actscale_config.json").read_bytes()
    model.strength = -2.0
    model.save_pretrained(tmp_path)
    (tmp_path / "actscale_config.json").write_bytes(config)  # a process that was killed in between
    assert ActScaleModel.from_pretrained(tiny_model("llama"), tmp_path).strength == -2.0
    model.intervention.save_pretrained(tmp_path)
    assert ActScaleModel.from_pretrained(tiny_model("llama"), tmp_path).strength == 1.0


def test_checkpoints_without_a_checksum_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "fit.safetensors"
    save_file({"alpha": torch.zeros(2)}, path, metadata={"format": "actscale_fast fit 1", "settings": "{}"})
    with pytest.raises(ValueError, match=r"fit\.safetensors was written by an earlier version.*; delete it to start"):
        checkpoint.load(path, {}, {"alpha": torch.zeros(2)})


@pytest.mark.parametrize("name", ["summary.json", "history.json", "evaluation.json", "intervention.json"])
def test_files_of_two_fits_of_a_sweep_are_not_exchanged(name: str, tmp_path: Path) -> None:
    damage.write_sweep(tmp_path, 0)
    first, second = tmp_path / "fit-0" / name, tmp_path / "fit-1" / name
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.json: (damaged|of another fit|not found)"):
        damage.read_sweep(tmp_path)


def test_a_damaged_evaluation_is_not_computed_again(tmp_path: Path) -> None:
    from sweep_cases import run_sweep

    run_sweep({"seed": [0]}, folder=tmp_path, evaluate_on=conflicts(4, seed=3))
    (path,) = tmp_path.glob("*/evaluation.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.", b"1.", 1))
    for call in (
        lambda: run_sweep({"seed": [0]}, folder=tmp_path, evaluate_on=conflicts(4, seed=3)),
        lambda: af.load_sweep(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"evaluation\.json: damaged"):
            call()
    path.unlink()
    run_sweep({"seed": [0]}, folder=tmp_path, evaluate_on=conflicts(4, seed=3))
    assert path.read_bytes() == whole


def test_older_sweep_folders_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('[{"label": "seed=0"}]')
    with pytest.raises(ValueError, match=r"sweep\.json: damaged \(it has no checksum: written by an earlier version"):
        af.load_sweep(tmp_path)


def test_temporaries_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    command = "from actscale_fast import _files as f; print(f._temporary_name(f.Path('a.json')))"
    root = str(Path(_files.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    dead = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment, check=True)
    names = {"dead": dead.stdout.strip(), "living": _files._temporary_name(Path("b.json"))}
    names["of another host"] = names["dead"].replace(_files._host(), "0123abcd")
    names["old"] = _files._temporary_name(Path("c.json"))
    for name in names.values():
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / names["old"], (time.time() - 90_000,) * 2)
    (tmp_path / ".hidden.json").write_text("{}")
    write_sealed(tmp_path / "other.json", {"a": 1})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"other.json", ".hidden.json", names["living"], names["of another host"]}


def test_a_sealed_file_is_json_that_anybody_can_read(tmp_path: Path) -> None:
    for content in ({"a": [1, 2.5, None], "checksum": 3}, [{"a": "ü"}, {"b": 2}]):
        raw = write_sealed(tmp_path / "file.json", content)
        first = parsed(raw) if isinstance(content, dict) else parsed(raw)[0]
        assert len(first["checksum"]) == 64
        expected = {"a": [1, 2.5, None]} if isinstance(content, dict) else content
        assert read_sealed(tmp_path / "file.json") == expected


def test_a_fit_resumes_from_a_checkpoint_or_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    import tiny

    path = tmp_path / "fit.safetensors"
    run(tiny.llama(), conflicts(4), steps=4, checkpoint=path)
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 9):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        scalars = af.ActivScalar.for_model(tiny.llama())
        with pytest.raises(ValueError, match=r"fit\.safetensors"):
            run(tiny.llama(), conflicts(4), steps=4, checkpoint=path, intervention=scalars)
        assert scalars.n_active == 0


def test_a_sweeps_fit_is_committed_by_its_summary_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(fit_folder, "write_sealed", killed)
        with pytest.raises(KeyboardInterrupt):
            damage.write_sweep(tmp_path, 0)
    assert (tmp_path / "fit-0" / "intervention.json").exists()
    assert not (tmp_path / "fit-0" / "summary.json").exists()
    damage.write_sweep(tmp_path, 1)
    damage.read_sweep(tmp_path)


def test_a_checkpoint_is_an_ordinary_file_that_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kept = damage.state(0)
    kept.tensors |= {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4), "turned": torch.eye(3).t()}
    checkpoint.save(tmp_path / "fit.safetensors", kept, {"label": 'a "checksum":"0"'})
    checkpoint.save(tmp_path / "fit.safetensors", kept, {"label": 'a "checksum":"0"'})
    found = load_file(tmp_path / "fit.safetensors")
    assert found.keys() == kept.tensors.keys()
    assert all(torch.equal(value, kept.tensors[name]) for name, value in found.items())
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "fit.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"fit.safetensors", "plain"}


def test_a_fit_that_an_index_lists_over_and_over_is_read_once(tmp_path: Path) -> None:
    import json

    damage.write_sweep(tmp_path, 0)
    told = json.loads((tmp_path / "sweep.json").read_text())[1:]
    write_sealed(tmp_path / "sweep.json", told * 2**12)
    fits = af.load_sweep(tmp_path).fits
    assert len({id(fit.intervention) for fit in fits}) == 1
    write_sealed(tmp_path / "sweep.json", [*told, {**told[0], "label": "another"}])
    with pytest.raises(ValueError, match=r"sweep\.json: damaged .'fit-1' is listed twice"):
        af.load_sweep(tmp_path)
