"""The data of the commands: kinds of files, other names of columns, and prompts in a chat template."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import word_models
from transformers import AutoModelForCausalLM, AutoTokenizer

import actscale_fast as af
from actscale_fast._json import read_sealed, write_sealed
from actscale_fast.cli import loading, main
from actscale_fast.cli.loading import examples_for
from actscale_fast.cli.parser import build_parser

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}Q: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}A:\n{% endif %}"
)
PAIRS = (("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"))
ROWS = [
    {"question": f"The capital of {country} is", "answer": right, "foil": wrong, "base": "The capital of Norway is"}
    for country, right, wrong in PAIRS
]
COLUMNS = {"prompt": "question", "correct": "answer", "wrong": "foil", "source": "base"}
NAMED = ["--columns", "prompt=question,correct=answer", "--columns", "wrong=foil,source=base"]
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokenizer has a chat template."""
    folder = word_models.save_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The rows in a file of every kind, by its ending."""
    folder = tmp_path_factory.mktemp("files")
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [list(ROWS[0]), *(map(str, row.values()) for row in ROWS)]
        (folder / f"data{ending}").write_text("".join(mark.join(line) + "\n" for line in lines))
    (folder / "data.json").write_text(json.dumps(ROWS))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if importlib.util.find_spec("pyarrow"):
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "data.parquet")
    return {path.suffix: str(path) for path in folder.iterdir()}


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def scalars_in(folder: Path) -> list[Any]:
    intervention = af.load_intervention(folder)
    assert isinstance(intervention, af.ActivScalar)
    return intervention.alpha.tolist()


@pytest.mark.parametrize("ending", ENDINGS)
def test_fit_reads_every_kind_of_file_with_other_names_of_columns(
    model: str, files: dict[str, str], ending: str, tmp_path: Path
) -> None:
    if ending not in files:
        pytest.skip("pyarrow is not installed")
    run("fit", "--model", model, "--data", files[ending], *NAMED, "--out", tmp_path, "--steps", "2")
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    scalars = af.ActivScalar.for_model(loaded[0])
    examples = [af.Example(row["question"], row["answer"], row["foil"]) for row in ROWS]
    af.fit(*loaded, examples, scalars, steps=2, progress=False)
    assert scalars_in(tmp_path) == scalars.alpha.tolist()
    record = json.loads((tmp_path / "fit.json").read_text(encoding="utf-8"))
    assert (record["columns"], record["chat"]) == (COLUMNS, False)


@pytest.mark.parametrize("chat", [False, True])
def test_every_command_with_data_takes_columns_and_chat(
    model: str, files: dict[str, str], chat: bool, tmp_path: Path
) -> None:
    def data(ending: str) -> list[str]:
        return ["--model", model, "--data", files.get(ending, files[".csv"]), *NAMED, *(["--chat"] if chat else [])]

    fitted, tested = tmp_path / "fitted", ["--test-data", files[".json"], "--steps", "1"]
    run("fit", *data(".csv"), *tested, "--out", fitted)
    run("sweep", *data(".parquet"), *tested, "--out", tmp_path / "sweep", "--minimality", "0.1")
    run("attribution", *data(".tsv"), "--out", tmp_path / "attribution")
    run("interchange", *data(".jsonl"), "--layers", "1", "--epochs", "1", "--out", tmp_path / "das")
    run("evaluate", *data(".json"), "--intervention", fitted, "--out", tmp_path / "fitted.json")
    run("evaluate", *data(".json"), "--intervention", tmp_path / "das", "--out", tmp_path / "das.json")

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def user(text: object) -> Any:
        return [{"role": "user", "content": str(text)}] if chat else str(text)

    examples = [
        af.Example(
            **{"messages" if chat else "prompt": user(row["question"])},
            correct=str(row["answer"]), wrong=str(row["foil"]), source=user(row["base"]),
        )
        for row in ROWS
    ]  # fmt: skip
    for name in ("fitted", "das"):
        expected = af.evaluate(loaded, tokenizer, examples, af.load_intervention(tmp_path / name)).to_dict()
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == expected
    assert json.loads((fitted / "evaluation.json").read_text()) == json.loads((tmp_path / "fitted.json").read_text())
    scores = json.loads((tmp_path / "attribution" / "attribution.json").read_text())["logit_difference"]
    assert scores == pytest.approx(expected["baseline"]["logit_difference"], abs=1e-5)
    (swept,) = af.load_sweep(tmp_path / "sweep").fits
    assert swept.evaluation == af.evaluate(loaded, tokenizer, examples, swept.intervention)


def test_a_task_in_a_chat_is_evaluated_as_it_was_learned(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--model", model, "--task", "country-capital", "--n-train", "4", "--n-test", "4"]
    run("fit", *task, "--chat", "--steps", "1", "--out", tmp_path / "fitted")
    assert "begin with a space" not in capsys.readouterr().err
    run("evaluate", *task, "--intervention", tmp_path / "fitted", "--out", tmp_path / "evaluation.json")
    learned = json.loads((tmp_path / "fitted" / "evaluation.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == learned


def test_a_task_in_a_chat_keeps_the_space_that_an_earlier_fit_learned(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ["--model", model, "--task", "country-capital", "--n-train", "4", "--n-test", "4"]
    with monkeypatch.context() as earlier:
        earlier.setattr(loading, "without_needless_space", lambda example, _: example)
        run("fit", *task, "--chat", "--steps", "1", "--out", tmp_path / "fitted")
    path = tmp_path / "fitted" / "fit.json"
    record = read_sealed(path)
    assert record.pop("answers_stripped") is True
    write_sealed(path, record)
    learned = json.loads((tmp_path / "fitted" / "evaluation.json").read_text(encoding="utf-8"))
    for words in (["--intervention", tmp_path / "fitted", *task], [tmp_path / "fitted"]):
        capsys.readouterr()
        run("evaluate", *words, "--out", tmp_path / "evaluation.json")
        assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == learned
        assert "begin with a space" in " ".join(capsys.readouterr().err.split())


def test_the_answers_of_a_task_begin_as_the_chat_template_has_it(model: str) -> None:
    words = ["--task", "country-capital", "--n-train", "4", "--n-test", "4", "--out", "o"]
    plain, chat = (build_parser().parse_args(["fit", *words, *more]) for more in ([], ["--chat"]))
    tokenizer = AutoTokenizer.from_pretrained(model)
    (written, _), (begun, _) = (examples_for(options, tokenizer, 0, ([], [])) for options in (plain, chat))
    assert all(example.correct[0] == example.wrong[0] == " " for example in written)
    assert [(example.correct, example.wrong) for example in begun] == [
        (example.correct.strip(), example.wrong.strip()) for example in written
    ]
    tokenizer.chat_template = TEMPLATE.replace("A:\n", "A:")  # a word follows after a space
    spaced, _ = examples_for(chat, tokenizer, 0, ([], []))
    assert [example.correct for example in spaced] == [example.correct for example in written]


def test_generate_writes_the_prompt_in_the_chat_template(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    af.ActivScalar.for_model(AutoModelForCausalLM.from_pretrained(model)).save_pretrained(tmp_path)
    words = ["generate", "--model", model, "--intervention", tmp_path, "--strength", "0", "--max-new-tokens", "3"]
    shown = []
    for prompt, chat in (("The capital", ["--chat"]), ("<s>Q: The capital A:", []), ("The capital", [])):
        run(*words, "--prompt", prompt, *chat)
        shown.append(capsys.readouterr().out.partition("\n")[2])
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "data.csv has no column 'prompt' (or 'messages'); it has 'question', 'answer', 'foil', 'base'; a CSV",
        ),
        (["--columns", "prompt=questoin"], "has no column 'questoin'; it has .*; did you mean 'question'?"),
        (["--columns", "prompt=question"], "has no column 'correct'; it has"),
        (["--columns", "promt=question"], "columns: got the field 'promt', expected one of .*; did you mean 'prompt'?"),
        ([*NAMED, "--chat"], "--chat: this model's tokenizer has no chat template"),
    ],
)
def test_columns_and_chats_that_are_not_there_are_named(
    words: list[str], message: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = str(word_models.save_model(tmp_path / "model"))
    capsys.readouterr()
    assert main(["fit", "--model", plain, "--data", files[".csv"], "--out", str(tmp_path / "out"), *words]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for part in message.split(".*"):
        assert part in said


def test_columns_are_pairs_and_belong_to_data(capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--task", "country-capital", "--out", "out", "--columns"]
    with pytest.raises(SystemExit):
        main([*fit, "correct"])
    assert "argument --columns: got 'correct', expected FIELD=NAME such as correct=answer" in capsys.readouterr().err
    assert main([*fit, "correct=answer"]) == 1
    assert "--columns cannot be used with --task" in capsys.readouterr().err
    from actscale_fast.cli.values import column_names

    assert column_names("correct=the answer, in full,wrong=a=b") == {"correct": "the answer, in full", "wrong": "a=b"}
