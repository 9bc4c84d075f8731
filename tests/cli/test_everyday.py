"""What every command line has: --version, --json, --quiet, --config, suggestions, and errors without numbers."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import word_models

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.cli import main
from actscale_fast.cli.app import _one_line
from actscale_fast.cli.config_file import with_config
from actscale_fast.cli.parser import build_parser
from actscale_fast.extraction.continuations import Sampling, generated
from actscale_fast.frozen.encoder import TextEncoder
from actscale_fast.tasks.examples import Example, save_examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and an intervention that `fit` saved: MODEL, DATA, FIT."""
    root = tmp_path_factory.mktemp("root")
    word_models.save_model(root / "MODEL")
    pairs = (("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"))
    save_examples(root / "DATA", [Example(f"The capital of {a} is {w}. A:", f" {c}", f" {w}") for a, c, w in pairs])
    words = ["fit", "--model", str(root / "MODEL"), "--data", str(root / "DATA"), "--out", str(root / "FIT")]
    assert main([*words, "--steps", "2", "--layers", "-1,0", "--margin", "2", "--include-answers"]) == 0
    return root


def in_folder(folder: Path, words: str) -> list[str]:
    return [str(folder / word) if word in ("MODEL", "DATA", "FIT") else word for word in words.split()]


def usage_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"actscale-fast {af.__version__}\n"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("evaluate --model MODEL --intervention FIT --data DATA", "flip_to_correct"),
        ("fit --model MODEL --data DATA --test-data DATA --steps 1 --out o", "evaluation"),
        ("generate --model MODEL --intervention FIT --prompt Paris --max-new-tokens 2", "prompts"),
        ("attribution --model MODEL --data DATA --out o", "scores"),
        ("info FIT", "kind"),
    ],
)
def test_json_is_the_only_thing_on_stdout(
    folder: Path, words: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / word) if word == "o" else word for word in in_folder(folder, words)]
    capsys.readouterr()
    assert main([*given, "--json"]) == 0
    shown = capsys.readouterr()
    assert key in json.loads(shown.out)
    assert shown.err
    assert main([*given, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert key in json.loads(shown.out)
    assert shown.err == ""


def test_a_failure_with_json_leaves_stdout_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*in_folder(folder, "evaluate --model MODEL --data DATA"), "--intervention", "none", "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1


def test_quiet_prints_results_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = in_folder(folder, "fit --model MODEL --data DATA --test-data DATA --steps 1 --quiet")
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr()
    assert "Held-out examples" in shown.out
    assert "saved in" not in shown.out
    assert shown.err == ""


def test_quiet_leaves_warnings_each_on_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Example("The capital of Italy is ", "Rome", "Oslo"), Example("The capital of A is ", "Rome", "Paris")]
    save_examples(tmp_path / "spaces", rows)
    words = in_folder(folder, "attribution --model MODEL --no-knock-out")
    for more in ([], ["--quiet"]):
        capsys.readouterr()
        assert main([*words, "--data", str(tmp_path / "spaces"), "--out", str(tmp_path / "o"), *more]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("actscale-fast: warning: row 1 of ")
        assert "end with a space" in line


def test_no_progress_bar_is_drawn_where_stderr_is_no_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = in_folder(folder, "fit --model MODEL --data DATA --steps 2")
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_writes_the_options_that_repeat_it(folder: Path, tmp_path: Path) -> None:
    config = folder / "FIT" / "config.toml"
    table = tomllib.loads(config.read_text(encoding="utf-8"))
    assert table["command"] == "fit"
    assert (table["steps"], table["layers"], table["margin"]) == (2, "-1,0", 2)
    assert table["include-answers"] is True
    out = tmp_path / "again"
    assert main(["fit", "--config", str(config), "--out", str(out)]) == 0
    first, second = (af.load_intervention(path) for path in (folder / "FIT", out))
    assert torch.equal(first.get_parameter("alpha"), second.get_parameter("alpha"))
    assert tomllib.loads((out / "config.toml").read_text()) == table | {"out": str(out)}


def test_the_command_line_replaces_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'command = "fit"\ntask = "greater-than"\nsteps = 3\nlr = 0.5\nlayers = [0, 1]\none-direction = true\n'
    )
    parser = build_parser()
    options = parser.parse_args(with_config(["fit", "--config", str(file), "--steps=9", "--out", "o"], parser))
    assert (options.task, options.steps, options.lr, options.layers) == ("greater-than", 9, 0.5, [0, 1])
    assert options.one_direction
    # --data excludes --task, so that of the file goes
    options = parser.parse_args(with_config(["fit", "--config", str(file), "--data", "d", "--out", "o"], parser))
    assert (options.task, options.data) == (None, "d")
    as_json = tmp_path / "c.json"
    as_json.write_text('{"prompt": ["A", "B, C"], "strength": [[-1, 1], 0.5], "intervention": "i"}')
    options = parser.parse_args(with_config(["generate", "--config", str(as_json), "--chat"], parser))
    assert (options.prompt, options.strength, options.chat) == (["A", "B, C"], [[-1.0, 1.0], [0.5]], True)
    options = parser.parse_args(with_config(["generate", f"--config={as_json}", "--prompt", "D"], parser))
    assert options.prompt == ["D"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz = 3", "'stepz' is not an option of fit; did you mean 'steps'?"),
        ("steps = ", "is not TOML"),
        ("steps = true", "--steps is True, expected a text, a number or a list"),
        ('one-direction = "yes"', "--one-direction is 'yes', expected true or false"),
        ('command = "sweep"', "belongs to the command 'sweep', expected 'fit'"),
        ('config = "other.toml"', "'config' is not an option of fit"),
        ('steps = "many"', "argument --steps: got 'many'"),
    ],
)
def test_a_bad_file_of_options_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    assert message in usage_error(capsys, ["fit", "--config", str(file), "--task", "greater-than", "--out", "o"])


def test_a_missing_file_of_options_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = usage_error(capsys, ["fit", "--config", str(tmp_path / "none.toml")])
    assert line.endswith(f"{tmp_path / 'none.toml'}: no such file or directory")


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        ("fti", "did you mean 'fit'?"),
        ("demo --setps 3", "did you mean --steps instead of --setps?"),
        ("fit --task greater-than --ouf x", "did you mean --out instead of --ouf?"),
        ("fit --task country-captal --out x", "did you mean 'country-capital'?"),
        ("attribution --task greater-than --out x --site heads", "did you mean 'head'?"),
        ("extract actadd", "did you mean 'act-add'?"),
    ],
)
def test_misspelt_words_get_a_suggestion(words: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert suggestion in usage_error(capsys, words.split())


def test_errors_of_the_system_have_no_number() -> None:
    assert _one_line(FileNotFoundError(2, "No such file or directory", "a b")) == "a b: no such file or directory"
    assert _one_line(OSError(28, "No space left on device")) == "no space left on device"
    assert _one_line(FileNotFoundError("data: there is no file x")) == "data: there is no file x"


def test_info_says_what_a_folder_holds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(folder / "FIT")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("kind ActivScalar", "llama, 2 layers, 4 heads of 8", "site head", "layers 1, 0", "of 8 ℓ1 norm"):
        assert words in printed
    assert "margin 2.0" in printed
    both = af.load_intervention(folder / "FIT")
    (both + both).save_pretrained(tmp_path / "both")
    assert main(["info", str(tmp_path / "both"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], len(found["parts"]), found["record"]) == ("Composite", 2, None)
    assert found["parts"][0]["largest"][0].keys() == {"layer", "head", "position", "value", "group"}


def generate(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    capsys.readouterr()
    words = in_folder(folder, "generate --model MODEL --intervention FIT --max-new-tokens 6 --strength 0,1")
    assert main([*words, *more]) == 0
    return capsys.readouterr().out


def test_draws_depend_on_the_seed_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, other = ("--prompt", "The capital of Italy is"), ("--prompt", "What is the capital of France?")
    draw = ("--temperature", "1.5", "--json", "--seed")
    first = json.loads(generate(folder, capsys, *prompt, *draw, "3"))["prompts"]
    assert json.loads(generate(folder, capsys, *other, *prompt, *draw, "3"))["prompts"][1:] == first
    assert json.loads(generate(folder, capsys, *prompt, *draw, "4"))["prompts"] != first
    greedy = json.loads(generate(folder, capsys, *prompt, "--json"))
    assert json.loads(generate(folder, capsys, *prompt, "--temperature", "0", "--json")) == greedy
    nucleus = generate(folder, capsys, *prompt, "--temperature", "1.5", "--top-p", "1e-6", "--json")
    assert json.loads(nucleus) == greedy


def test_drawing_leaves_the_processs_random_numbers_alone() -> None:
    model = tiny.llama()
    encoder = TextEncoder(layout(model), tiny.tokenizer())
    state = torch.random.get_rng_state()
    made = [
        generated(model, encoder.tokenizer, encoder.batch([[4, 5, 6]]), 8, sampling=Sampling(seed=seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made[0] == made[1] != made[2]


def test_a_stream_prints_the_same_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("--prompt", "The capital of Italy is")
    for how in ((), ("--temperature", "1.5", "--seed", "3")):
        (found,) = json.loads(generate(folder, capsys, *prompt, *how, "--json"))["prompts"]
        lines = generate(folder, capsys, *prompt, *how, "--stream").splitlines()
        assert lines[0] == found["prompt"]
        texts = [one["text"].strip() for one in found["continuations"]]
        assert [" ".join(line.split()) for line in lines[1:]] == [f"β = 0: {texts[0]}", f"β = +1: {texts[1]}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [("--top-p 0.9", "--top-p needs a --temperature"), ("--stream --json", "--stream cannot be used with --json")],
)
def test_options_that_do_not_go_together(
    folder: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(in_folder(folder, f"generate --model MODEL --intervention FIT --prompt Paris {words}")) == 1
    assert message in capsys.readouterr().err


def test_one_seed_serves_the_fits_and_the_examples_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast.cli import sweep as module

    def seeds(*words: str) -> tuple[int, list[int]]:
        options = build_parser().parse_args(["sweep", "--task", "greater-than", "--out", "o", *words])
        monkeypatch.setattr(module, "load_files", lambda options: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            module.sweep(options)
        return options.task_seed, options.seeds

    assert seeds() == (0, [0])
    assert seeds("--seed", "3") == (3, [3])
    assert seeds("--task-seed", "3") == (3, [0])
    assert seeds("--seeds", "1-2") == (0, [1, 2])
