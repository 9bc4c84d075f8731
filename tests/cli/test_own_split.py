"""`evaluate FOLDER` measures on the examples that the fit held out, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import word_models

from actscale_fast._json import read_sealed, write_sealed
from actscale_fast.cli import main
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
    """The figures on stdout, and what is printed beside them in one line."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), " ".join(shown.err.split())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_held_out_examples_of_a_task_are_found_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted(model, tmp_path / "out", *TASK, "--split", "both")
    figures, title = evaluated(capsys, out)
    assert figures == json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert title.startswith("Held-out examples of the fit, country-capital, seed 5 (3 prompts)")
    figures, title = evaluated(capsys, "--intervention", out, "--n-test", 2)
    assert figures["n_examples"] == 2
    assert "seed 5, changed by the options given (2 prompts)" in title
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

    held_out.write_text(held_out.read_text().replace("Berlin", "Oslo"))
    assert f"{held_out} no longer gives the examples that the fit held out (got 2 with SHA-256" in refused(capsys, out)
    held_out.unlink()
    assert f"was evaluated on {held_out}, which is not there" in refused(capsys, out)


def test_the_demos_examples_are_found_again(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", model, "--out", str(tmp_path / "demo"), "--steps", "1"]) == 0
    figures, _ = evaluated(capsys, tmp_path / "demo")
    assert figures == json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))["held_out"]


def test_the_reason_is_given_where_nothing_is_known(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "data.jsonl")
    out = fitted(model, tmp_path / "out", "--data", data)
    assert "was fitted without held-out examples (--test-data); name the examples with --data" in refused(capsys, out)
    record = read_sealed(out / "fit.json")
    del record["examples"]
    write_sealed(out / "fit.json", record)
    assert "of an earlier version, has no digest of what was held out" in refused(capsys, out)
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
