"""`sweep --points` and `--gather`, the records in a sweep's folders, and the options that load a model."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import word_models
from refused_commands import refused

from actscale_fast._json import read_sealed, write_sealed
from actscale_fast.cli import main
from actscale_fast.tasks.examples import Example, save_examples

PAIRS = (("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(word_models.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "examples.jsonl"
    save_examples(path, [Example(f"The capital of {a} is {w}. A:", f" {c}", f" {w}") for a, c, w in PAIRS])
    return str(path)


def test_shares_of_a_path_are_gathered_and_their_fits_are_evaluated_by_their_folders(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    words = ["sweep", "--model", model, "--data", data, "--test-data", data, "--steps", "1", "--layers", "1"]
    words += ["--path", "2", "--seeds", "0-1", "--at-once", "1", "--out", str(out)]
    assert main([*words, "--points", "1/2"]) == 0
    assert "2 fits of the share 1/2" in capsys.readouterr().out
    assert "2 of 4 points in" in refused(capsys, "sweep", "--gather", "--out", str(out))
    assert "belongs to jobs with another --path (path 2, now 3)" in refused(
        capsys, *words, "--path", "3", "--points", "2/2"
    )
    assert "belongs to jobs with another --path (site head, now mlp_out)" in refused(
        capsys, *words, "--site", "mlp_out", "--points", "2/2"
    )
    assert main([*words, "--points", "2/2"]) == 0
    assert main(["sweep", "--gather", "--out", str(out)]) == 0
    assert "4 fits" in capsys.readouterr().out
    config = tomllib.loads((out / "config.toml").read_text())  # of the whole sweep, for --config
    assert (config["path"], config.keys() & {"points", "gather"}) == (2, set())
    assert (out / "front.png").is_file()
    (first, *_) = json.loads((out / "sweep.json").read_text())
    record = read_sealed(out / first["folder"] / "fit.json")
    assert (record["fit_seed"], record["minimality"]) == (first["settings"]["seed"], first["settings"]["minimality"])
    assert main(["evaluate", str(out / first["folder"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logit_difference"] == pytest.approx(first["evaluation"]["logit_difference"], rel=1e-5)
    for option in (["--points", "1/2"], ["--steps", "1"], ["--model", model], ["--seeds=0-1"], ["--warm-start"]):
        expected = f"--gather reads what is in --out; it cannot be used with {option[0].partition('=')[0]}"
        assert refused(capsys, "sweep", "--gather", "--out", str(out), *option).endswith(expected)
    assert "one of --data and --task is required" in refused(capsys, "sweep", "--out", str(out))
    assert "points: got '3/2', expected a share" in refused(capsys, *words, "--points", "3/2")


def test_how_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--model", model, "--data", data, "--steps", "1", "--layers", "1"]
    out = tmp_path / "eager"
    assert main([*words, "--attn", "eager", "--device-map", "cpu", "--out", str(out)]) == 0
    record = read_sealed(out / "fit.json")
    assert record["attn"] == "eager"
    write_sealed(out / "fit.json", record | {"quantize": "torchao-int8"})
    assert main(["evaluate", str(out), "--data", data, "--quantize", "none"]) == 0
    assert "--device-map divides the model" in refused(
        capsys, *words, "--device-map", "auto", "--device", "cpu", "--out", str(tmp_path / "two")
    )
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    told = refused(capsys, *words, "--quantize", "torchao-int8", "--out", str(tmp_path / "int8"))
    assert "quantize: torchao-int8 needs torchao, which cannot be imported" in told
    assert told.endswith("pip install torchao")


def test_a_full_disk_is_found_out_before_the_fit(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=-1))
    monkeypatch.setattr("actscale_fast.cli.commands.load_model", None)
    told = refused(capsys, "fit", "--model", model, "--data", data, "--out", str(tmp_path / "out"))
    assert f"{tmp_path / 'out' / 'intervention.json'}: no room on the disk" in told
