"""`evaluate FOLDER` measures on the examples that the fit held out, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import word_models

import actscale_fast as af
from actscale_fast._json import read_sealed, write_sealed
from actscale_fast.architectures.model_origin import ModelOrigin
from actscale_fast.cli import loading, main
from actscale_fast.cli.provenance import load_saved
from actscale_fast.tasks.examples import Example, save_examples

PAIRS = (("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"))
TASK = ["--task", "country-capital", "--n-train", "4", "--n-test", "3", "--seed", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(word_models.save_model(tmp_path_factory.mktemp("model")))


def written(path: Path, pairs: Any = PAIRS) -> str:
    save_examples(path, [Example(f"The capital of {a} is {w}. A:", f" {c}", f" {w}") for a, c, w in pairs])
    return str(path)


def fitted(model: str, out: Path, *words: str) -> Path:
    assert main(["fit", "--model", model, *words, "--steps", "1", "--layers", "1", "--out", str(out)]) == 0
    return out


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], str]:
    """The figures on stdout, and what is printed beside them in one line, after the one about the model."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    shown = capsys.readouterr()
    about_model, _, rest = shown.err.partition("\n")
    assert about_model.startswith("actscale-fast: taking the model of the fit: ")
    return json.loads(shown.out), " ".join(rest.split())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rewrite(out: Path, **changes: Any) -> None:
    """Change keys of the record; those that are changed to None are left out."""
    record = read_sealed(out / "fit.json") | changes
    write_sealed(out / "fit.json", {name: value for name, value in record.items() if name not in changes or value})


def test_the_held_out_examples_of_a_task_are_found_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted(model, tmp_path / "out", *TASK, "--split", "both")
    figures, title = evaluated(capsys, out)
    assert figures == json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert title.startswith("Held-out examples of the fit, country-capital, seed 5 (3 prompts)")
    figures, title = evaluated(capsys, "--intervention", out, "--n-test", 2)
    assert figures["n_examples"] == 2
    assert title.startswith("Held-out examples of the fit, country-capital, seed 5, 2 of 3 (2 prompts)")
    assert "--columns cannot be used with --task" in refused(capsys, out, "--columns", "correct=answer")


def test_the_held_out_file_is_found_again_with_its_columns(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--columns", "prompt=q,correct=a,wrong=b"]
    for name in ("train.csv", "test.csv"):
        lines = ["q,a,b", *(f"The capital of {a} is,{c},{w}" for a, c, w in PAIRS)]
        (tmp_path / name).write_text("\n".join(lines[: 4 if name == "train.csv" else 3]) + "\n")
    held_out = tmp_path / "test.csv"
    data = ["--data", str(tmp_path / "train.csv"), "--test-data", str(held_out)]
    out = fitted(model, tmp_path / "out", *data, *names)
    figures, title = evaluated(capsys, out)
    assert figures == json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert title.replace(" ", "").startswith(f"Held-outexamplesofthefit,{held_out}(2prompts)")
    other, _ = evaluated(capsys, out, "--data", tmp_path / "train.csv", *names)
    assert other["n_examples"] == 3

    line = refused(capsys, out, "--n-test", 10, "--seed", 1)
    assert f"--n-test, --seed cannot be used here: {out} was evaluated on the file {held_out}, of which all" in line

    held_out.write_text(held_out.read_text().replace("Berlin", "Oslo"))
    assert "no longer gives the examples that the fit held out" in refused(capsys, out, *names)
    _, title = evaluated(capsys, out, "--columns", "prompt=q,correct=b,wrong=a")
    assert f"warning: with --columns these are not the examples that {out} held out" in title
    assert "Examples of the file, not those that the fit held out: " in title
    assert f"{held_out} no longer gives the examples that the fit held out (got 2 with SHA-256" in refused(capsys, out)
    held_out.unlink()
    assert f"was evaluated on {held_out}, which is not there" in refused(capsys, out)


def test_other_examples_of_the_task_are_not_called_held_out(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted(model, tmp_path / "out", *TASK)
    for words in (["--split", "template"], ["--seed", "7"], ["--n-test", "4"]):
        _, title = evaluated(capsys, out, *words)
        told = f"actscale-fast: warning: with {words[0]} these are not the examples that {out} held out"
        assert title.startswith(told)
        assert title.count("warning") == 1
        assert "Examples of the task, not those that the fit held out: country-capital, seed" in title
        assert "Held-out examples" not in title
    _, title = evaluated(capsys, out, "--split", "country", "--seed", 5)
    assert title.startswith("Held-out examples of the fit, country-capital, seed 5 (3 prompts)")


def test_the_keys_that_an_earlier_record_lacks_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted(model, tmp_path / "out", *TASK, "--split", "both")
    rewrite(out, split=None)
    assert "fit.json was written by an earlier version and lacks split; pass --data" in refused(capsys, out)
    _, title = evaluated(capsys, out, "--split", "both")
    assert title.startswith("Held-out examples of the fit")


def test_the_demos_examples_are_found_again(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", model, "--out", str(tmp_path / "demo"), "--steps", "1"]) == 0
    figures, _ = evaluated(capsys, tmp_path / "demo")
    assert figures == json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))["held_out"]


def test_the_reason_is_given_where_nothing_is_known(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "data.jsonl")
    out = fitted(model, tmp_path / "out", "--data", data)
    assert "was fitted without held-out examples (--test-data); pass --data or --task" in refused(capsys, out)
    record = read_sealed(out / "fit.json")
    del record["examples"]
    write_sealed(out / "fit.json", record)
    assert "fit.json was written by an earlier version and does not identify the held-out examples" in refused(
        capsys, out
    )
    (out / "fit.json").write_text("{")
    assert "fit.json: damaged, or not the record of a fit" in refused(capsys, out)
    (out / "fit.json").unlink()
    assert "has no record of a fit (fit.json), which says what was held out" in refused(capsys, out)
    for words in ([], [str(out), "--intervention", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *words])
        assert stop.value.code == 2


def test_the_model_of_the_fit_is_the_default(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fitted(model, tmp_path / "out", "--data", written(tmp_path / "data.jsonl"))
    words = ["generate", "--intervention", str(out), "--prompt", "The capital of Italy is", "--max-new-tokens", "1"]
    texts = []
    for more in ([], ["--model", model]):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["merge", "--intervention", str(out), "--out", str(tmp_path / "merged")]) == 0


def test_the_record_must_name_a_model_that_is_there(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted(model, tmp_path / "out", "--data", written(tmp_path / "data.jsonl"))
    data = ["--data", str(tmp_path / "data.jsonl"), "--intervention", str(out)]
    rewrite(out, model=7)
    assert f"{out}/fit.json: got the model 7, expected a string or null" in refused(capsys, *data)
    rewrite(out, model=str(tmp_path / "gone"))
    assert f"{out}/fit.json names a model that cannot be loaded; pass --model" in refused(capsys, *data)


def test_the_demo_model_is_not_taken_in_silence(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = loading._from_transformers(model, "auto", bars=False)
    monkeypatch.setattr(loading, "load_demo_model", lambda: own)
    scalars = af.ActivScalar.for_model(own[0])
    words = ["generate", "--intervention", str(tmp_path), "--prompt", "The capital of", "--max-new-tokens", "1"]
    for name, told in (("x/y", "so the demo model is taken; but intervention.json says that it was made for x/y"),
                       (None, "does not say which model it was made for: taking the demo model")):  # fmt: skip
        scalars.set_origin(ModelOrigin(name))
        scalars.save_pretrained(tmp_path)
        capsys.readouterr()
        assert main(words) == 0
        assert told in capsys.readouterr().err


def test_origins_that_a_record_does_not_know_are_left_alone(model: str, tmp_path: Path) -> None:
    words = ["--data", written(tmp_path / "data.jsonl"), "--site", "head,mlp_out"]
    out = fitted(model, tmp_path / "out", *words)
    record = read_sealed(out / "fit.json")
    saved = af.load_intervention(out)
    first, second = saved.singles
    known = second.location.origin
    assert known is not None
    first.set_origin(ModelOrigin("other"))
    second.location = replace(second.location, origin=None)
    saved.save_pretrained(out)
    assert [part.location.origin for part in load_saved(out).singles] == [ModelOrigin("other"), None]
    record["intervention"] = hashlib.sha256((out / "intervention.json").read_bytes()).hexdigest()
    write_sealed(out / "fit.json", record)
    found = [part.location.origin for part in load_saved(out).singles]
    assert found == [ModelOrigin("other"), replace(known, architecture=None, quantisation=None)]
    (out / "fit.json").unlink()
    assert [part.location.origin for part in load_saved(out).singles] == [ModelOrigin("other"), None]
