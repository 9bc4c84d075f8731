"""The command line: what it makes, what it prints, and that a mistake costs one line and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import word_models

from actscale_fast import defaults
from actscale_fast.cli import main
from actscale_fast.cli.options import HEAD_METHODS
from actscale_fast.cli.parser import build_parser
from actscale_fast.cli.values import joined_signed_lists
from actscale_fast.interventions import ActivScalar, load_intervention
from actscale_fast.learning.head_selection.methods import METHODS
from actscale_fast.learning.head_selection.selection import HeadSelection
from actscale_fast.tasks.examples import Example, save_examples

COMMANDS = (
    "demo", "fit", "sweep", "attribution", "heads", "interchange", "extract", "combine", "evaluate", "stress", "info",
    "generate", "plot", "merge", "reproduce", "completion", "doctor", "plan", "verify", "serving", "bench",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(word_models.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "examples.jsonl"
    pairs = (("Germany", "Berlin", "Paris"), ("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"))
    save_examples(path, [Example(f"The capital of {a} is {w}. A:", f" {c}", f" {w}") for a, c, w in pairs])
    return str(path)


@pytest.fixture
def fitted(model: str, tmp_path: Path) -> str:
    """A folder with scalars that are not zero."""
    from transformers import AutoModelForCausalLM

    scalars = ActivScalar.for_model(AutoModelForCausalLM.from_pretrained(model))
    with torch.no_grad():
        scalars.alpha[0, 0, 1], scalars.alpha[1, 0, 3] = 1.5, -2.0
    scalars.save_pretrained(tmp_path / "fitted")
    return str(tmp_path / "fitted")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that fails with status 1."""
    capsys.readouterr()
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("actscale-fast: error: ")
    return lines[0]


def usage_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_demo_leaves_an_intervention_pictures_and_figures(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--model", model, "--out", str(out), "--steps", "2", "--threads", "1"]) == 0
    names = {"intervention.json", "heads.png", "history.png", "history.json", "demo.json"}
    names.add("fit.json")
    names |= {entry.name for entry in out.glob("intervention-*.safetensors")}
    assert {entry.name for entry in out.iterdir()} == names
    report = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert report["held_out"]["n_active"] == load_intervention(out).n_active
    settings, record = report["settings"], json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert settings["minimality"] == record["minimality"] == defaults.MINIMALITY
    assert settings["minimality_weight"] == record["objective"]["minimality"] > 0
    assert report["strengths"] == [-1, 0, 1]
    assert [len(texts) for texts in report["continuations"].values()] == [3, 3, 3]
    assert len(json.loads((out / "history.json").read_text(encoding="utf-8"))) == 2
    printed = capsys.readouterr().out
    told = ("correct above wrong, β = +1", "before", "after", "95 % interval", "active scalars", "peak memory")
    for words in (*told, *report["continuations"]):
        assert words in printed


def test_fit_saves_what_evaluate_generate_and_plot_take(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["fit", "--model", model, "--data", data, "--test-data", data, "--out", str(out), "--steps", "3"]
    assert (
        main([*words, "--layers", "-1", "--site", "mlp_out", "--positions", "-2,-1", "--checkpoint", f"{out}.ckpt"])
        == 0
    )
    location = load_intervention(out).location
    assert (location.site, location.layers, location.positions) == ("mlp_out", (1,), (-2, -1))
    assert Path(f"{out}.ckpt").is_file()
    held_out = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))

    figures = tmp_path / "figures.json"
    place = ["--intervention", str(out)]
    assert main(["evaluate", *place, "--model", model, "--data", data, "--out", str(figures)]) == 0
    assert json.loads(figures.read_text(encoding="utf-8")) == held_out
    assert (
        main(["generate", *place, "--model", model, "--prompt", "The capital of Italy is", "--max-new-tokens", "3"])
        == 0
    )
    assert main(["plot", *place, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["plot", "--history", str(out / "history.json"), "--out", str(tmp_path / "b.pdf")]) == 0
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "b.pdf").is_file()


def test_the_objectives_options_reach_the_fit(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inspect

    from actscale_fast import defaults, learning

    of_library = learning.fit
    seen: dict[str, Any] = {}

    def fit(model: Any, tokenizer: Any, examples: Any, intervention: Any, objective: Any, **settings: Any) -> Any:
        seen.update(settings, objective=objective, n=len(examples))
        return learning.FitResult(intervention, [], 0.0)

    monkeypatch.setattr(learning, "fit", fit)
    words = "--margin 2 --faithfulness 0.5 --minimality 0 --kl reverse --include-answers --one-direction --lr 0.1"
    words += " --steps 7 --batch-size 2 --accumulate 2 --seed 5 --schedule linear"
    assert main(["fit", "--model", model, "--data", data, "--out", str(tmp_path / "o"), *words.split()]) == 0
    wanted = learning.Objective(
        margin=2, faithfulness=0.5, minimality=0, exclude_answers=False, kl="reverse", directions=(1,)
    )
    assert seen["objective"] == wanted
    assert seen["n"] == 3
    expected = {"steps": 7, "lr": 0.1, "batch_size": 2, "accumulate": 2, "seed": 5, "schedule": "linear"}
    assert {name: seen[name] for name in expected} == expected
    assert main(["fit", "--model", model, "--data", data, "--out", str(tmp_path / "s")]) == 0
    assert seen["objective"] == learning.Objective()
    assert seen["lr"] == inspect.signature(of_library).parameters["lr"].default
    assert main(["fit", "--kind", "steer-vec", "--model", model, "--data", data, "--out", str(tmp_path / "v")]) == 0
    assert (seen["lr"], seen["objective"]) == (defaults.LR, learning.Objective())
    shares = "--lr 2% --minimality 7%"
    assert main(["fit", "--model", model, "--data", data, "--out", str(tmp_path / "p"), *shares.split()]) == 0
    assert (seen["lr"], seen["objective"].minimality) == ("2%", "7%")
    for bad in ("0%", "101%", "fast"):
        with pytest.raises(SystemExit):
            main(["fit", "--model", model, "--data", data, "--out", str(tmp_path / "p"), "--lr", bad])


def test_each_strength_has_its_own_continuation(model: str, fitted: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actscale_fast.cli.output import continuations
    from actscale_fast.patching.patch import patch

    prompt = "The capital of Germany is"
    frozen, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    intervention = load_intervention(fitted)
    (together,) = continuations(frozen, tokenizer, intervention, [prompt], [-1.0, 0.0, 1.0], 5)
    inputs = tokenizer(prompt, return_tensors="pt")
    for strength, text in zip((-1.0, 0.0, 1.0), together, strict=True):
        with torch.no_grad(), patch(frozen, intervention, strength=strength):
            tokens = frozen.generate(
                inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
            )
        assert tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == text
    assert len(set(together)) > 1

    words = ["generate", "--model", model, "--intervention", fitted, "--prompt", prompt, "--max-new-tokens", "5"]
    assert main([*words, "--strength", "-1,0", "--strength", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for label, text in zip(("-1", "0", "+1"), together, strict=True):
        assert " ".join(f"{label} {text}".replace("\n", "⏎").split()) in printed


def test_a_merged_model_gives_the_patched_models_logits(model: str, fitted: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from actscale_fast.patching.patch import patch

    out = tmp_path / "merged"
    assert main(["merge", "--model", model, "--intervention", fitted, "--strength", "-0.5", "--out", str(out)]) == 0
    ids = torch.arange(4, 12)[None]
    plain, merged = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model, out))
    with torch.no_grad(), patch(plain, load_intervention(fitted), strength=-0.5):
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: actscale-fast {command}")


def test_every_option_has_a_help_text() -> None:
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert set(commands) == set(COMMANDS)
    recipes = next(action for action in commands["extract"]._actions if action.dest == "recipe").choices
    silent = [
        (name, action.dest)
        for name, command in (*commands.items(), *recipes.items())
        for action in command._actions
        if not action.help and action.dest != "recipe"
    ]
    assert silent == []


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\ntry:\n    from actscale_fast.cli import main\n    main(['fit', '--help'])\n"
        "except SystemExit:\n    print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["fit", "--out", "x"], "one of the arguments --data --task is required"),
        (["fit", "--task", "country-capital"], "required: --out"),
        (["demo", "--steps", "0"], "--steps: got '0', expected a whole number that is at least 1"),
        (["demo", "--wrong"], "unrecognized arguments: --wrong"),
        (["fit", "--task", "country-capital", "--out", "x", "--layers", "3-1"], "got '3-1' in '3-1', expected layers"),
        (["fit", "--task", "country-capital", "--out", "x", "--layers", "a"], "such as 0,3,10-19,-1"),
        (["fit", "--task", "country-capital", "--out", "x", "--positions", "0-3"], "expected positions such as 0,1,-1"),
        (["fit", "--task", "country-capital", "--out", "x", "--lr", "0"], "--lr: got '0', expected a number above 0"),
        (["fit", "--task", "country-capital", "--out", "x", "--margin", "nan"], "expected a number that is at least 0"),
        (["fit", "--task", "country-capital", "--data", "y", "--out", "x"], "not allowed with argument --task"),
        (
            ["generate", "--intervention", "x", "--prompt", "y", "--strength", "inf"],
            "expected numbers separated by commas",
        ),
    ],
)
def test_wrong_usage_exits_with_two(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in usage_error(capsys, *words)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--layers", "-1,-2", "--out", "x"], ["--layers=-1,-2", "--out", "x"]),
        (["--strength", "-.5"], ["--strength=-.5"]),
        (["--strength", "1"], ["--strength", "1"]),
        (["--prompt", "-1"], ["--prompt", "-1"]),
        (["bench", "--", "--layers", "-1"], ["bench", "--", "--layers", "-1"]),
    ],
)
def test_lists_may_begin_with_a_minus(words: list[str], joined: list[str]) -> None:
    assert joined_signed_lists(words) == joined


def test_layer_lists_hold_numbers_ranges_and_negatives() -> None:
    words = joined_signed_lists(["fit", "--task", "country-capital", "--out", "x", "--layers", "-1,0,3,10-12"])
    assert build_parser().parse_args(words).layers == [-1, 0, 3, 10, 11, 12]


def test_mistakes_cost_one_line(
    model: str, data: str, fitted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, none = str(tmp_path / "out"), str(tmp_path / "none")
    fit = ["fit", "--model", model, "--out", out]
    assert f"no folder {none}" in refused(capsys, "demo", "--model", none, "--out", out)
    assert f"data: there is no file {none}" in refused(capsys, *fit, "--data", none)
    assert f"test-data: there is no file {none}" in refused(capsys, *fit, "--data", data, "--test-data", none)
    assert "layers: got 9, expected -2 to 1" in refused(capsys, *fit, "--data", data, "--layers", "9")
    assert "which cannot be used here" in refused(capsys, *fit, "--data", data, "--device", "warp:9")
    assert none in refused(capsys, "evaluate", "--model", model, "--data", data, "--intervention", none)
    picture = ["plot", "--intervention", fitted, "--out"]
    assert "expected a file that ends in .png" in refused(capsys, *picture, str(tmp_path / "x.txt"))
    generate = ["generate", "--model", model, "--intervention", fitted, "--prompt"]
    assert "no tokens" in refused(capsys, *generate, "")
    assert "exceed the model's context of 64" in refused(capsys, *generate, "Paris " * 60)
    assert "no chat template" in refused(capsys, *generate, "Paris", "--chat")
    both = ["--task", "country-capital", "--test-data", data]
    assert "--test-data cannot be used with --task" in refused(capsys, *fit, *both)


def test_a_bad_line_of_data_is_named(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.jsonl"
    words = ["fit", "--model", model, "--out", str(tmp_path / "out"), "--data", str(file)]
    file.write_text('{"prompt": "A:", "correct": " Paris", "wrong": " Paris"}\n', encoding="utf-8")
    assert f"row 1 of {file}: wrong: got ' Paris', the same as correct" in refused(capsys, *words)
    file.write_text('{"prompt": "A:", "correct": " Paris Rome", "wrong": " Paris"}\n', encoding="utf-8")
    assert f"row 1 of {file}: the tokens of correct ' Paris Rome' begin with" in refused(capsys, *words)
    assert not (tmp_path / "out" / "intervention.json").exists()


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "demo", "--model", str(tmp_path / "empty"), "--out", str(tmp_path / "out"))
    assert "empty" in line


def test_an_intervention_of_another_model_is_refused(
    fitted: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    tokenizer = word_models.tokenizer()
    tokenizer.save_pretrained(other)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3
    )
    LlamaForCausalLM(config).save_pretrained(other)
    line = refused(capsys, "evaluate", "--model", str(other), "--data", data, "--intervention", fitted)
    assert "made for another model" in line
    assert "n_layers 2 (the model has 1)" in line


def test_a_place_that_cannot_be_written_to_is_known_before_the_work(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actscale_fast import learning

    monkeypatch.setattr(learning, "fit", lambda *_, **__: pytest.fail("the fit began"))
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "fit", "--model", model, "--data", data, "--out", str(tmp_path / "file"))


def test_paths_and_prompts_are_checked_before_a_model_is_loaded(
    data: str, fitted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actscale_fast.cli import commands, model_of_fit

    for module in (commands, model_of_fit):
        monkeypatch.setattr(module, "load_model", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    folder, file = str(tmp_path), str(tmp_path / "file")
    place = ["--intervention", fitted]
    fit = ["fit", "--data", data, "--out"]
    assert f"out: {file} is a file, expected a folder" in refused(capsys, *fit, file)
    assert f"out: {file} is a file" in refused(capsys, *fit, f"{file}/deeper")
    assert f"checkpoint: {folder} is a folder" in refused(capsys, *fit, f"{folder}/o", "--checkpoint", folder)
    assert "there is no file" in refused(capsys, "fit", "--data", f"{file}x", "--out", f"{folder}/o")
    assert not (tmp_path / "o").exists()
    assert f"out: {folder} is a folder" in refused(capsys, "evaluate", *place, "--data", data, "--out", folder)
    assert f"out: {file} is a file" in refused(capsys, "merge", *place, "--out", file)
    assert "prompt: got ''" in refused(capsys, "generate", *place, "--prompt", "")


def test_a_new_fit_leaves_no_figures_of_the_one_before(model: str, data: str, tmp_path: Path) -> None:
    words = ["fit", "--model", model, "--data", data, "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main([*words, "--test-data", data]) == 0
    assert (tmp_path / "out" / "evaluation.json").is_file()
    assert main(words) == 0
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_evaluate_uses_the_seed_of_the_fit_and_warns_of_another(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--model", model, "--task", "country-capital", "--n-train", "8", "--n-test", "8"]
    out = tmp_path / "out"
    assert main(["fit", *task, "--out", str(out), "--steps", "1", "--seed", "1"]) == 0
    held_out = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert json.loads((out / "fit.json").read_text(encoding="utf-8"))["seed"] == 1
    figures = tmp_path / "figures.json"
    words = ["evaluate", *task, "--intervention", str(out), "--out", str(figures)]
    capsys.readouterr()
    assert main(words) == 0
    assert json.loads(figures.read_text(encoding="utf-8")) == held_out
    assert capsys.readouterr().err == ""
    assert main([*words, "--seed", "0"]) == 0
    assert "fitted with --seed 1; with --seed 0 some of these examples" in capsys.readouterr().err
    (out / "fit.json").write_text("[", encoding="utf-8")
    assert "damaged, or not the record of a fit" in refused(capsys, *words)


def test_a_folder_that_lacks_weights_is_refused(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = word_models.save_model(tmp_path / "model")
    kept = load_file(folder / "model.safetensors")
    del kept["lm_head.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, "fit", "--model", str(folder), "--data", data, "--out", str(tmp_path / "out"))
    assert "1 tensors are missing: lm_head.weight" in line


def test_the_defaults_of_the_library_and_the_command_line_are_the_same() -> None:
    import inspect

    from actscale_fast import learning

    options = vars(build_parser().parse_args(["fit", "--task", "country-capital", "--out", "x"]))
    of_fit = {name: p.default for name, p in inspect.signature(learning.fit).parameters.items()}
    objective = learning.Objective()
    for name in ("steps", "batch_size", "seed", "schedule"):
        assert options[name] == of_fit[name], name
    assert options["accumulate"] == learning.Execution().accumulate
    assert options["checkpoint_every"] == learning.Checkpoint().every
    for name in ("margin", "faithfulness", "kl"):
        assert options[name] == getattr(objective, name), name
    assert (options["lr"], options["minimality"]) == (None, None)  # of scalars the library's, of vectors their own


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plot", "--intervention", str(tmp_path / "none"), "--out", str(tmp_path / "x.png"), "--debug"]
    assert main(words) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interruption_ends_with_130_and_one_line(
    fitted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actscale_fast import plots

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "heatmap", interrupted)
    assert main(["plot", "--intervention", fitted, "--out", str(tmp_path / "x.png")]) == 130
    assert capsys.readouterr().err.strip() == "actscale-fast: interrupted"


def test_bench_hands_its_arguments_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast.cli import bench

    checkout = tmp_path / "checkout"
    (checkout / "benchmarks").mkdir(parents=True)
    (checkout / "benchmarks" / "__init__.py").touch()
    (checkout / "benchmarks" / "__main__.py").write_text(
        "import pathlib, sys\npathlib.Path('seen').write_text(' '.join(sys.argv[1:]))\nsys.exit(7)\n"
    )
    monkeypatch.setattr(bench, "__file__", str(checkout / "actscale_fast" / "cli" / "bench.py"))
    assert main(["bench", "--", "loss", "--quick"]) == 7
    assert (checkout / "seen").read_text() == "loss --quick"


def test_bench_without_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from actscale_fast.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "actscale_fast" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert "checkout of the source" in refused(capsys, "bench")


def test_the_installed_program_runs(model: str, fitted: str, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "actscale_fast.cli", "generate", "--model", model, "--intervention", fitted]
    done = subprocess.run([*words, "--prompt", "Paris is", "--max-new-tokens", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuation" in done.stdout
    failed = subprocess.run([*words, "--prompt", ""], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("actscale-fast: error: prompt: got ''")
    assert "Traceback" not in failed.stderr


@pytest.mark.real_model
def test_a_short_fit_on_the_real_model_moves_both_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = "fit --task country-capital --n-train 4 --n-test 4 --steps 3 --batch-size 4 --lr 0.1 --layers 15-29"
    assert main([*words.split(), "--out", str(out), "--threads", "2"]) == 0
    after = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    before = after["baseline"]
    assert after["logit_difference"] > before["logit_difference"] + 0.5
    assert after["logit_difference_inverted"] < before["logit_difference_inverted"] - 0.5


def test_sweep_fits_every_combination_and_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    words = [
        "sweep",
        "--model",
        model,
        "--data",
        data,
        "--test-data",
        data,
        "--steps",
        "2",
        "--out",
        str(tmp_path / "s"),
    ]
    assert main([*words, "--minimality", "0.4,0.01", "--seeds", "0-1", "--layers", "1", "--layers", "0,1"]) == 0
    out = capsys.readouterr().out
    assert "8 fits" in out
    told = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [fit["chosen"]["minimality"] for fit in told] == [0.4] * 4 + [0.01] * 4
    assert (tmp_path / "s" / "front.png").is_file()
    first = {place: place.stat().st_mtime_ns for place in (tmp_path / "s").rglob("intervention-*.safetensors")}
    assert len(first) == 8
    assert main([*words, "--minimality", "0.4,0.01", "--seeds", "0-2", "--layers", "1", "--layers", "0,1"]) == 0
    assert all(place.stat().st_mtime_ns == when for place, when in first.items())
    assert main([*words[:-1], str(tmp_path / "path"), "--path", "3", "--tolerance", "0.001"]) == 0
    weights = [fit["chosen"]["minimality"] for fit in json.loads((tmp_path / "path" / "sweep.json").read_text())]
    assert weights == sorted(weights, reverse=True)
    error = refused(capsys, *words, "--path", "3", "--minimality", "1")
    assert "--path chooses the weights" in error


def test_attribution_writes_figures_and_a_picture_and_prints_the_top(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    words = ["attribution", "--model", model, "--out", str(tmp_path), "--threads", "1"]
    assert main([*words, "--data", data, "--positions", "0,-1", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    for part in ("3 prompts", "predicted", "measured", "Pearson", "Spearman", "position"):
        assert part in printed
    found = json.loads((tmp_path / "attribution.json").read_text(encoding="utf-8"))
    assert (found["n_examples"], found["location"]["positions"]) == (3, [0, -1])
    assert (tmp_path / "attribution.png").read_bytes().startswith(b"\x89PNG")

    assert main([*words, "--task", "indirect-object", "--n-train", "4", "--site", "mlp_out", "--no-knock-out"]) == 0
    printed = capsys.readouterr().out
    assert "Pearson" not in printed
    assert "head" not in printed
    found = json.loads((tmp_path / "attribution.json").read_text(encoding="utf-8"))
    assert (found["n_examples"], found["knock_out"]) == (4, None)
    assert "layers: got 9" in refused(capsys, *words, "--data", data, "--layers", "9")


def test_heads_saves_a_selection_that_is_evaluated_and_compares_several(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    assert tuple(METHODS) == HEAD_METHODS
    words = ["heads", "--model", model, "--threads", "1", "--data", data, "--test-data", data, "--strengths", "1,2"]
    one = str(tmp_path / "one")
    assert main([*words, "--method", "gates", "--option", "steps=2", "--k", "2", "--out", one]) == 0
    assert "2 of 8 heads by gates" in capsys.readouterr().out
    selection = HeadSelection.load(tmp_path / "one" / "heads.json")
    assert load_intervention(one).n_active == selection.k == 2
    assert (tmp_path / "one" / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", one, "--data", data]) == 0
    assert main(["info", one]) == 0
    two = tmp_path / "two"
    assert main([*words, "--method", "juice", "--option", "n_scored=1", "--k", "1,2", "--out", str(two)]) == 0
    found = json.loads((two / "comparison.json").read_text(encoding="utf-8"))["results"]
    assert [row["k"] for row in found] == [1, 2]
    words_of = ["generate", "--intervention", str(two / "juice-2"), "--max-new-tokens", "2"]
    assert main([*words_of, "--prompt", "The capital of Italy is"]) == 0  # its first run is that of the prompt
    out = ["--out", str(tmp_path / "no")]
    assert "--method: got 'sammy'" in refused(capsys, *words, "--method", "sammy", *out)
    assert "give --test-data" in refused(capsys, *words[:7], "--k", "1,2", *out)
    assert "NAME=VALUE" in usage_error(capsys, *words, "--option", "steps", *out)


@pytest.mark.parametrize("command", ["fit", "sweep", "attribution"])
def test_the_parts_of_a_model_can_be_named(
    command: str, model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "--model", model, "--data", data, "--out", str(tmp_path / "out")]
    words += [] if command == "attribution" else ["--steps", "1"]
    named = ["--layers-path", "model.layers", "--projection", "self_attn.o_proj", "--mlp", "mlp"]
    assert main([*words, *named]) == 0
    if command == "fit":
        assert load_intervention(tmp_path / "out").location.paths["projection"] == "self_attn.o_proj"
    assert "no layer (LlamaDecoderLayer) has a module 'attn.out'" in refused(capsys, *words, "--projection", "attn.out")


def test_minimality_may_be_a_share(model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "share"
    words = ["--model", model, "--data", data, "--steps", "2", "--out", str(out)]
    assert main(["fit", *words, "--minimality", "10%"]) == 0
    record = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert record["minimality"] == "10%"
    assert f"is {record['objective']['minimality']}" in capsys.readouterr().out
    assert record["objective"]["minimality"] > 0
    assert main(["sweep", *words[:-1], str(tmp_path / "sweep"), "--minimality", "50%,0.1"]) == 0
    refusals = {"110%": "a share from 0% to 100%", "abc%": "a share such as 10%", "x": "or a share such as 10%"}
    for text, expected in refusals.items():
        assert expected in usage_error(capsys, "fit", *words, "--minimality", text)


def test_a_record_tells_where_a_fit_comes_from_and_another_fine_tune_is_warned_of(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actscale_fast import __version__
    from actscale_fast.architectures.weights_digest import weights_digest

    out, other = tmp_path / "out", tmp_path / "other"
    assert main(["fit", "--model", model, "--data", data, "--test-data", data, "--steps", "1", "--out", str(out)]) == 0
    record = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert record["versions"]["actscale_fast"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["date"].endswith("+00:00")
    assert (record["dtype"], record["weights"]) == ("float32", weights_digest(loaded))
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    assert record["examples"] == {"train": {"n": 3, "sha256": digest}, "test": {"n": 3, "sha256": digest}}
    assert record["objective"]["margin"] == record["margin"]

    with torch.no_grad():
        loaded.model.layers[0].mlp.down_proj.weight += 0.01
    loaded.save_pretrained(other)
    AutoTokenizer.from_pretrained(model).save_pretrained(other)
    for command in (["evaluate", "--data", data], ["generate", "--prompt", "The capital of Italy is"]):
        words = [*command, "--intervention", str(out), "--model"]
        capsys.readouterr()
        assert main([*words, model]) == 0
        assert capsys.readouterr().err == ""
        assert main([*words, str(other)]) == 0
        assert "was made for a model of the same shape with other weights" in capsys.readouterr().err
        assert main([*words, str(other), "--dtype", "bfloat16"]) == 0
        assert "other weights" not in capsys.readouterr().err


def test_the_number_of_active_scalars_may_be_given(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--model", model, "--data", data, "--steps", "3", "--out", str(tmp_path / "few"), "--n-active", "2"]
    assert main(words) == 0
    assert 1 <= load_intervention(tmp_path / "few").n_active <= 2
    record = json.loads((tmp_path / "few" / "fit.json").read_text(encoding="utf-8"))
    assert record["n_active"] == 2
    assert record["minimality"] is None
    assert record["objective"]["minimality"] == 0
    assert "--n-active chooses the weight" in refused(capsys, *words, "--minimality", "0.1")
    assert "expected a single ActivScalar" in refused(capsys, *words, "--kind", "steer-vec")
