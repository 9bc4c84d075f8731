"""Examples from every kind of source: the same ones from all, and what is refused, with which words."""

from __future__ import annotations

import collections
import importlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import actscale_fast as af
from actscale_fast.tasks import row_files

COLUMNS = ("prompt", "correct", "wrong", "note")
ROWS = [
    ("The capital of A, B is", " Paris", " Berlin", "left out"),
    ("Größe „x“ of\nC is", " Rome", " Oslo", "an extra column"),
]
EXPECTED = [af.Example(*row[:3]) for row in ROWS]
DICTS = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]


def csv_text(rows: list[dict[str, Any]], delimiter: str = ",", header: str | None = None) -> str:
    def quoted(cell: object) -> str:
        return '"' + str(cell).replace('"', '""') + '"' if any(mark in str(cell) for mark in ',;\t\n"') else str(cell)

    lines = [delimiter.join(quoted(cell) for cell in row.values()) for row in rows]
    return "\n".join([(header or delimiter).join(rows[0]), *lines]) + "\n"


def in_file(ending: str, text: Callable[[list[dict[str, Any]]], str]) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], folder: Path) -> Path:
        path = folder / f"data{ending}"
        path.write_text(text(rows), encoding="utf-8", newline="")
        return path

    return write


def parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def data_set(rows: list[dict[str, Any]], _: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


SOURCES: dict[str, Callable[[list[dict[str, Any]], Path], Any]] = {
    "jsonl": in_file(".jsonl", lambda rows: "\n".join(json.dumps(row) for row in rows)),
    "jsonl with blank lines": in_file(".txt", lambda rows: "\n\n".join(json.dumps(row) + "\r" for row in rows) + "\n"),
    "json": in_file(".json", lambda rows: json.dumps(rows)),
    "indented json": in_file(".json", lambda rows: "\n" + json.dumps(rows, indent=1)),
    "csv": in_file(".csv", csv_text),
    "csv with a byte order mark": in_file(".csv", lambda rows: "\ufeff" + csv_text(rows).replace("\n", "\r\n")),
    "csv with semicolons": in_file(".CSV", lambda rows: csv_text(rows, ";") + "\n;;;\n"),
    "csv with spaces in its header": in_file(".csv", lambda rows: csv_text(rows, header=", ")),
    "tsv": in_file(".tsv", lambda rows: csv_text(rows, "\t")),
    "parquet": parquet,
    "path as a string": lambda rows, folder: str(SOURCES["jsonl"](rows, folder)),
    "dicts": lambda rows, _: rows,
    "generator": lambda rows, _: iter(rows),
    "named tuples": lambda rows, _: [collections.namedtuple("Row", row)(**row) for row in rows],
    "pandas": lambda rows, _: pytest.importorskip("pandas").DataFrame(rows, index=[7, 3]),
    "rows of pandas": lambda rows, _: pytest.importorskip("pandas").DataFrame(rows).itertuples(),
    "polars": lambda rows, _: pytest.importorskip("polars").DataFrame(rows),
    "pyarrow": lambda rows, _: pytest.importorskip("pyarrow").Table.from_pylist(rows),
    "datasets": data_set,
    "datasets in another format": lambda rows, _: data_set(rows, _).with_format("numpy"),
    "streamed datasets": lambda rows, _: data_set(rows, _).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_examples(kind: str, tmp_path: Path) -> None:
    rows = DICTS
    if kind == "csv with a byte order mark":  # its lines end in \r\n, also inside a cell
        rows = [row | {"prompt": row["prompt"].replace("\n", " ")} for row in DICTS]
    loaded = af.load_examples(SOURCES[kind](rows, tmp_path))
    assert loaded == [af.Example(row["prompt"], row["correct"], row["wrong"]) for row in rows]
    assert [str(example.where).split(" of ")[0] for example in loaded] == ["row 1", "row 2"]


@pytest.mark.parametrize("kind", SOURCES)
def test_columns_may_have_other_names(kind: str, tmp_path: Path) -> None:
    rows = [{"question": r["prompt"].replace("\n", " "), "wrong": r["correct"], "foil": r["wrong"]} for r in DICTS]
    columns = {"prompt": "question", "correct": "wrong", "wrong": "foil"}
    loaded = af.load_examples(SOURCES[kind](rows, tmp_path), columns=columns)
    assert loaded == [af.Example(row["question"], row["wrong"], row["foil"]) for row in rows]


def test_tuples_lists_and_examples_are_rows(tmp_path: Path) -> None:
    assert af.load_examples([row[:3] for row in ROWS]) == EXPECTED
    assert af.load_examples([list(row[:3]) for row in ROWS]) == EXPECTED
    assert af.load_examples((*EXPECTED, *(row[:3] for row in ROWS))) == [*EXPECTED, *EXPECTED]
    assert af.load_examples([(*ROWS[0][:3], "a source")])[0].source == "a source"
    path = tmp_path / "arrays.json"
    path.write_text(json.dumps([row[:3] for row in ROWS]))
    assert af.load_examples(path) == EXPECTED
    path.write_text("\n".join(json.dumps(row[:3]) for row in ROWS))
    assert af.load_examples(path) == EXPECTED


def test_a_missing_source_is_none(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(DICTS).assign(source=["first", None])
    frame.to_parquet(tmp_path / "data.parquet")
    frame.to_csv(tmp_path / "data.csv", index=False)
    for source in (frame, frame.astype({"source": object}), tmp_path / "data.parquet", tmp_path / "data.csv"):
        assert [example.source for example in af.load_examples(source)] == ["first", None]


MESSAGES = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of A?"}],
    [{"role": "user", "content": "Capital of B?"}],
]


@pytest.mark.parametrize("kind", [*SOURCES, "tuples"])
def test_messages_replace_the_prompt_in_every_source(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": m, "correct": d["correct"], "wrong": d["wrong"]} for m, d in zip(MESSAGES, DICTS, strict=True)
    ]
    if "csv" in kind or kind == "tsv":
        rows = [row | {"messages": json.dumps(row["messages"])} for row in rows]
    source = [tuple(row.values()) for row in rows] if kind == "tuples" else SOURCES[kind](rows, tmp_path)
    loaded = af.load_examples(source)
    expected = [
        af.Example(correct=d["correct"], wrong=d["wrong"], messages=m) for m, d in zip(MESSAGES, DICTS, strict=True)
    ]
    assert loaded == expected
    assert [example.prompt for example in loaded] == ["", ""]
    af.save_examples(tmp_path / "saved.jsonl", loaded)
    assert af.load_examples(tmp_path / "saved.jsonl") == loaded


def test_a_row_with_both_says_which_one_it_means() -> None:
    row = {"prompt": "p", "messages": MESSAGES[1], "correct": "c", "wrong": "w"}
    with pytest.raises(ValueError, match="row 1 of examples: got both a prompt and messages; columns="):
        af.load_examples([row])
    assert af.load_examples([row], {"prompt": "prompt"})[0].messages is None
    assert af.load_examples([row], {"messages": "messages"})[0].prompt == ""
    assert af.load_examples([row | {"prompt": None}, row | {"messages": None}])[1].prompt == "p"


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hello", TypeError, "messages: got str, expected a list of messages with the keys 'role' and 'content'"),
        ([], ValueError, "messages: got none"),
        (["hello"], TypeError, "messages: message 1 is a str, expected a dict"),
        ([{"role": "user"}], ValueError, r"messages: message 1 has the keys \['role'\], expected 'role' and 'content'"),
        (
            [{"role": "user", "content": ["a"]}],
            TypeError,
            "messages: the content of message 1 is a list, expected a str",
        ),
        ([MESSAGES[1][0] | {"name": "me"}], ValueError, "message 1 has the keys .*'name'"),
    ],
)
def test_messages_without_a_role_or_content_are_refused(messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        af.Example(messages=messages, correct="c", wrong="w")


def test_an_example_has_a_prompt_or_messages() -> None:
    with pytest.raises(ValueError, match="messages: got a prompt as well, expected only one of them"):
        af.Example("p", "c", "w", messages=MESSAGES[1])
    with pytest.raises(ValueError, match="prompt: got '', expected text"):
        af.Example(correct="c", wrong="w")
    example = af.Example(correct="c", wrong="w", messages=[MESSAGES[1][0] | {"name": None}], where="row 1 of x")
    assert example.messages == tuple(MESSAGES[1])
    assert example == pickle.loads(pickle.dumps(example))
    assert len({example, af.Example("p", "c", "w")}) == 2
    assert repr(example).startswith("Example(correct='c', wrong='w', messages=(")


ROW = '{"prompt": "p", "correct": "c", "wrong": "w"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: got none, expected at least one example"),
        ("a.json", "[]", r"a\.json: got none, expected at least one example"),
        ("a.csv", "", r"a\.csv: got none, expected at least one example"),
        ("a.csv", "prompt,correct,wrong\n", r"a\.csv: got none, expected at least one example"),
        ("a.jsonl", ROW + "\n{\n", r"a\.jsonl, line 3: not JSON \(.*, column 2\); expected one object per line, or"),
        ("a.json", "[\n{},\n{]", r"a\.json, line 3: not JSON \(.*, column 2\)"),
        ("a.xlsx", "PK", r"a\.xlsx, line 1: not JSON .* \(a file is read as JSON unless its name ends in \.csv, \.t"),
        ("a.json", "[" * 100_000, r"a\.json, line 1: "),
        ("a.jsonl", ROW + "\n3\n", r"row 2 of .*a\.jsonl \(line 3\): got int, expected an object with the keys pro"),
        ("a.jsonl", ROW.replace('"c"', "7"), r"row 1 of .*a\.jsonl: correct: got int, expected a string"),
        ("a.jsonl", ROW.replace('"c"', "null"), r"row 1 of .*a\.jsonl: correct: the value is missing"),
        ("a.jsonl", ROW.replace('"c"', "NaN"), r"row 1 of .*a\.jsonl: correct: the value is missing"),
        ("a.jsonl", ROW + "{}", r"row 2 of .*a\.jsonl has no column 'prompt' \(or 'messages'\); it has none"),
        (
            "a.csv", "prompt,corect,wrong\np,c,w\n",
            r"a\.csv has no column 'correct'; it has 'prompt', 'corect', 'wrong'; did you mean 'corect\'\? "
            r"columns=\{'correct': 'corect'\} \(--columns correct=corect\) reads it",
        ),
        (
            "a.csv", "prompt,answer,wrong\np,c,w\n",
            r"a\.csv has no column 'correct'; it has 'prompt', 'answer', 'wrong'; columns=\{'correct': 'NAME'\} \(--",
        ),
        ("a.csv", "The capital is, A, B\n", "no column 'prompt' .*; a CSV file begins with a line of column names"),
        ("a.csv", "prompt,correct,wrong\np,c,w\n\nThe A, B is,c,w\n", r"line 4: got 4 cells, expected 3 .* contains"),
        ("a.csv", 'prompt,correct,wrong\n"p\nq",c,w\np,,w\n', r"row 2 of .*a\.csv \(line 4\): correct: the value is"),
        ("a.csv", 'prompt,correct,wrong\n"p,c,w\n', r"a\.csv, line 2: not CSV \(unexpected end of data\)"),
        ("a.csv", "prompt,prompt,correct,wrong\n", r"a\.csv: the column 'prompt' occurs twice in the header"),
        ("a.csv", "messages,correct,wrong\nhello,c,w\n", r"row 1 of .* \(line 2\): messages: got a string that is not"),
        ("a.parquet", "text", r"a\.parquet: cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_by_row_or_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        af.load_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("prompt,correct,wrong\nGröße,c,w\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8 \(.* at byte 23\); save the file as UTF-8"):
        af.load_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*{name}"):
        af.load_examples(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file of examples"):
        af.load_examples(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "examples: got int, expected examples: a path, or rows such as dicts"),
        (EXPECTED[0], TypeError, "examples: got Example, expected examples: a path"),
        ({"train": [], "test": []}, TypeError, "examples: got dict with the keys 'train', 'test', expected rows"),
        ([], ValueError, "examples: got none, expected at least one example"),
        (["text"], TypeError, "row 1 of examples: got str, expected an Example, a dict or a tuple"),
        ([ROWS[0][:2]], ValueError, r"row 1 of examples: got 2 values, expected \(prompt, correct, wrong\)"),
        ([ROWS[0][:3], ("p", "c", 3)], ValueError, "row 2 of examples: wrong: got int, expected a string"),
        (
            [DICTS[0], {"prompt": "p"}],
            ValueError,
            "row 2 of examples has no column 'correct'; it has 'prompt'; columns=",
        ),
        ([DICTS[0] | {"wrong": float("nan")}], ValueError, "row 1 of examples: wrong: the value is missing"),
    ],
)
def test_what_is_wrong_in_memory_is_named_by_row(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        af.load_examples(source)


def test_missing_and_other_values_in_a_data_frame_are_named_by_row() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(DICTS)
    for nothing in (None, float("nan"), pandas.NA, pandas.NaT):
        holes = frame.astype(object)
        holes.loc[1, "correct"] = nothing
        with pytest.raises(ValueError, match="row 2 of examples: correct: the value is missing"):
            af.load_examples(holes)
    with pytest.raises(ValueError, match="row 1 of examples: wrong: got int, expected a string"):
        af.load_examples(frame.assign(wrong=[1, 2]))
    with pytest.raises(
        ValueError, match="examples has no column 'wrong'; it has 'prompt', 'correct', 'Wrong '; did you"
    ):
        af.load_examples(frame[["prompt", "correct", "wrong"]].rename(columns={"wrong": "Wrong "}))
    with pytest.raises(ValueError, match="examples: the column 'wrong' occurs twice"):
        af.load_examples(pandas.concat([frame, frame[["wrong"]]], axis=1))
    with pytest.raises(ValueError, match="examples: got none"):
        af.load_examples(frame[:0])


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            {"corect": "a"},
            ValueError,
            "columns: got the field 'corect', expected one of prompt, .*; did you mean 'correct'",
        ),
        ("correct=a", TypeError, "columns: got str, expected a dict"),
        (
            {"source": "base"},
            ValueError,
            "row 1 of examples has no column 'base'; it has 'prompt', 'correct', 'wrong', 'n",
        ),
    ],
)
def test_wrong_names_of_columns_are_refused(columns: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        af.load_examples(DICTS, columns=columns)


@pytest.mark.parametrize("row", [EXPECTED[0], ROWS[0][:3]])
def test_rows_without_column_names_take_no_columns(row: Any) -> None:
    with pytest.raises(ValueError, match=r"row 1 of examples: a \w+ has no column names, so columns= cannot be used"):
        af.load_examples([row], columns={"correct": "answer"})


def test_parquet_is_read_by_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, missing = parquet(DICTS, tmp_path), {"pyarrow.parquet"}
    real = importlib.import_module

    def only_some(name: str, package: str | None = None) -> Any:
        if name in missing:
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(row_files.importlib, "import_module", only_some)
    assert af.load_examples(path) == EXPECTED  # by pandas
    missing.add("pandas")
    with pytest.raises(
        ImportError, match=r"data\.parquet: reading Parquet files needs pyarrow \(pip install pyarrow\)"
    ):
        af.load_examples(path)


def test_rows_keep_their_names_wherever_they_go(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(ROW + "\n" + ROW.replace('"c"', '" Paris Rome"').replace('"w"', '" Paris"'), encoding="utf-8")
    _, second = af.load_examples(path)
    scalars = af.ActivScalar.for_model(tiny.llama())
    message = rf"row 2 of {path} \(line 3\): the tokens of correct ' Paris Rome' begin with all"
    for examples in ([second], [af.Example("A", " Paris", " Rome"), second]):
        with pytest.raises(ValueError, match=message):
            af.evaluate(tiny.llama(), tiny.tokenizer(), examples, scalars)
        with pytest.raises(ValueError, match=message):
            af.sweep(tiny.llama(), tiny.tokenizer(), {"a": examples}, {"seed": [0]}, progress=False)
    sets = {"a": [("A", " Paris", " Rome")], "b": [("A", " Paris", " Rome"), ("A", " Paris Rome", " Paris")]}
    with pytest.raises(ValueError, match=r"row 2 of examples\['b'\]: the tokens of correct"):
        af.sweep(tiny.llama(), tiny.tokenizer(), sets, {"seed": [0]}, progress=False)


def test_everything_that_takes_examples_takes_a_path_or_rows(tmp_path: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    rows = [("The capital of A is", " Paris", " Berlin"), ("The capital of B is", " Rome", " Oslo")]
    examples = [af.Example(*row) for row in rows]
    af.save_examples(tmp_path / "data.jsonl", examples)
    found = []
    for source in (examples, rows, tmp_path / "data.jsonl", str(tmp_path / "data.jsonl")):
        scalars = af.ActivScalar.for_model(model)
        af.fit(model, tokenizer, source, scalars, steps=1, progress=False)
        swept = af.sweep(model, tokenizer, source, {"seed": [0]}, steps=1, evaluate_on=source, progress=False)
        found.append(
            (
                scalars.alpha.detach().clone(),
                swept.fits[0].evaluation,
                af.evaluate(model, tokenizer, source, scalars),
                af.attribution(model, tokenizer, source, progress=False).scores,
                af.minimality_path(model, tokenizer, source, 2, steps=1),
            )
        )
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
