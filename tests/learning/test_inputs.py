"""Every form of examples × everything that takes examples: the result is that of a list of `Example`s."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import word_models
from transformers import AutoModelForCausalLM, AutoTokenizer

import actscale_fast as af
from actscale_fast.cli import main

pytestmark = pytest.mark.usefixtures("unchecked_fits")

TEMPLATE = (
    "{% for message in messages %}Q: {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PAIRS = (("Germany", " Berlin", " Paris"), ("France", " Paris", " Rome"), ("Italy", " Rome", " Oslo"))
NAMES = {"prompt": "question", "correct": "answer", "wrong": "foil"}
#: What the rows say: prompts, chats, or answers of several tokens.
CONTENTS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"The capital of {a} is", "correct": c, "wrong": w} for a, c, w in PAIRS],
    "chats": [
        {"messages": [{"role": "user", "content": f"The capital of {a}"}], "correct": c, "wrong": w}
        for a, c, w in PAIRS
    ],
    "long answers": [
        {"prompt": f"The capital of {a} is", "correct": f"{c} Lima", "wrong": f"{w} Quito Lima"} for a, c, w in PAIRS
    ],
}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def library(name: str) -> Any:
    return pytest.importorskip(name)


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    """The rows in a file of the kind that its ending names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        library("pyarrow")
        tables, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(tables.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in row.values()])
    return path


#: How rows that a program holds are given; a name that begins with a dot is that of a file.
FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "dicts": list,
    "tuples": lambda rows: [tuple(row.values()) for row in rows],
    "generator": lambda rows: (af.Example(**row) for row in rows),
    "pandas": lambda rows: library("pandas").DataFrame(rows),
    "polars": lambda rows: library("polars").DataFrame(rows),
    "pyarrow": lambda rows: library("pyarrow").Table.from_pylist(rows),
    "datasets": lambda rows: library("datasets").Dataset.from_list(rows),
}
#: Every form with prompts; chats and long answers where a row is text, a dict, or of a library's own type.
CASES = [(form, "prompts") for form in (*ENDINGS, *FORMS)]
CASES += [(form, content) for content in ("chats", "long answers") for form in (".jsonl", ".csv", "dicts", "datasets")]


@functools.cache
def loaded() -> tuple[Any, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        word_models.save_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def fit(examples: Any) -> Any:
    result = af.fit(*loaded(), examples, af.ActivScalar.for_model(loaded()[0]), steps=1, progress=False)
    return result.intervention.alpha.tolist()


def sweep(examples: Any) -> Any:
    found = af.sweep(*loaded(), examples, {"minimality": [0.1]}, steps=1, progress=False)
    return found.fits[0].intervention.alpha.tolist()


def evaluate(examples: Any) -> Any:
    return af.evaluate(*loaded(), examples, filled())


def attribution(examples: Any) -> Any:
    return af.attribution(*loaded(), examples, knock_out=False, progress=False).scores.tolist()


def filled() -> af.ActivScalar:
    scalars = af.ActivScalar.for_model(loaded()[0])
    scalars[:] = 0.5
    return scalars


TAKERS = (fit, sweep, evaluate, attribution)


@functools.cache
def expected(taker: Callable[[Any], Any], content: str) -> Any:
    return taker([af.Example(**row) for row in CONTENTS[content]])


@pytest.mark.parametrize(("form", "content"), CASES, ids=[f"{form}-{content}" for form, content in CASES])
def test_every_function_takes_every_form_of_examples(form: str, content: str, tmp_path: Path) -> None:
    rows = CONTENTS[content]
    for taker in TAKERS:
        given = FORMS[form](rows) if form in FORMS else written(rows, tmp_path / f"data{form}")
        assert taker(given) == expected(taker, content), taker.__name__


@pytest.mark.parametrize(("ending", "content"), list(zip(ENDINGS, [*CONTENTS, *CONTENTS], strict=False)))
def test_every_command_takes_every_kind_of_file_with_other_names_of_columns(
    ending: str, content: str, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    loaded()[0].save_pretrained(model)
    loaded()[1].save_pretrained(model)
    filled().save_pretrained(tmp_path / "filled")
    rows = [{NAMES.get(name, name): value for name, value in row.items()} for row in CONTENTS[content]]
    named = ",".join(f"{name}={other}" for name, other in NAMES.items() if other in rows[0])
    data = ["--model", str(model), "--data", str(written(rows, tmp_path / f"data{ending}")), "--columns", named]

    assert main(["fit", *data, "--steps", "1", "--out", str(out / "fit")]) == 0
    assert af.load_intervention(out / "fit").get_parameter("alpha").tolist() == expected(fit, content)
    assert main(["sweep", *data, "--minimality", "0.1", "--steps", "1", "--out", str(out / "sweep")]) == 0
    assert af.load_sweep(out / "sweep").fits[0].intervention.get_parameter("alpha").tolist() == expected(sweep, content)
    words = ["--intervention", str(tmp_path / "filled"), "--out", str(out / "evaluation.json")]
    assert main(["evaluate", *data, *words]) == 0
    assert af.Evaluation.from_dict(json.loads((out / "evaluation.json").read_text())) == expected(evaluate, content)
    assert main(["attribution", *data, "--no-knock-out", "--out", str(out)]) == 0
    assert json.loads((out / "attribution.json").read_text())["scores"] == expected(attribution, content)
