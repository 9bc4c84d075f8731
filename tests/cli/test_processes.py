"""Commands that torchrun starts in two processes: what they print and write is that of one process."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from refused_commands import refused

import actscale_fast as af
from actscale_fast._json import read_sealed
from actscale_fast.cli import main
from actscale_fast.tasks.examples import Example, save_examples

#: Without it, transformers' weights do not say how they are sharded.
SAYS_HOW = find_spec("transformers.distributed.tensor_parallel") is not None
ENGINES: dict[str, list[str]] = {"whole": []}
if SAYS_HOW:
    ENGINES |= {"tensor-parallel": ["--tp", "2"], "fully-sharded": ["--fsdp", "2"]}
PAIRS = (("A", "Paris", "Rome"), ("B", "Berlin", "Oslo"), ("C", "Madrid", "Rome"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, examples, and the fit that other commands read."""
    root = tmp_path_factory.mktemp("processes")
    tiny.llama().save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    save_examples(root / "data.jsonl", [Example(f"The capital of {a} is", f" {c}", f" {w}") for a, c, w in PAIRS])
    given = ["--model", str(root / "model"), "--data", str(root / "data.jsonl"), "--quiet"]
    assert main(["fit", *given, "--steps", "2", "--out", str(root / "fitted")]) == 0
    return root


def commands(root: Path, out: Path) -> dict[str, list[str]]:
    model = ["--model", str(root / "model")]
    data = [*model, "--data", str(root / "data.jsonl")]
    fitting = [*data, "--test-data", str(root / "data.jsonl"), "--steps", "2"]
    return {
        "fit": ["fit", *fitting, "--json", "--checkpoint", str(out / "fit.safetensors"), "--out", str(out / "fit")],
        "sweep": ["sweep", *fitting, "--minimality", "0.1,0", "--out", str(out / "sweep")],
        "path": ["sweep", *fitting, "--path", "2", "--points", "1/1", "--out", str(out / "path")],
        "evaluate": ["evaluate", str(root / "fitted"), *data, "--json", "--out", str(out / "evaluation.json")],
        "generate": [
            "generate", "--intervention", str(root / "fitted"), "--prompt", "The capital of A is", "--json",
            "--max-new-tokens", "4",
        ],
        "attribution": ["attribution", *data, "--json", "--out", str(out / "attribution")],
        "heads": ["heads", *data, "--k", "2", "--json", "--out", str(out / "heads")],
        "extract": [
            "extract", "act-add", *model, "--positive", "Paris", "--negative", "Rome", "--layer", "1",
            "--coefficient", "2", "--out", str(out / "extracted"),
        ],
        "latent": [
            "extract", "latent", *model, "--sentence", "Paris is", "--layer", "1", "--steps", "2",
            "--out", str(out / "latent"),
        ],
    }  # fmt: skip


#: Runs the commands of a JSON file one after another, and keeps what each prints in another file.
SCRIPT = """
import contextlib, io, json, os, sys
from actscale_fast.cli import main
printed = {}
for engine, commands in json.load(open(sys.argv[1])).items():
    printed[engine] = {}
    for name, words in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(words) == 0, (engine, name)
        printed[engine][name] = out.getvalue()
json.dump(printed, open(f"{sys.argv[2]}/printed-{os.environ['RANK']}.json", "w"))
"""


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, dict[str, str]]]:
    """What each of two processes printed, by engine and command; the files of an engine are in a folder of its name."""
    script, words = folder / "script.py", folder / "commands.json"
    script.write_text(SCRIPT)
    wanted = {}
    for engine, options in ENGINES.items():
        (folder / engine).mkdir()
        wanted[engine] = {name: [*some, *options] for name, some in commands(folder, folder / engine).items()}
    words.write_text(json.dumps(wanted))
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), str(words), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"printed-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(folder: Path) -> tuple[Path, dict[str, str]]:
    """The files that one process writes, and what it prints for each command."""
    out, printed = folder / "one", {}
    out.mkdir()
    for name, words in commands(folder, out).items():
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert main(words) == 0
        printed[name] = text.getvalue()
    return out, printed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_print_and_write_what_one_does(
    engine: str, folder: Path, one: tuple[Path, dict[str, str]], two: list[dict[str, dict[str, str]]]
) -> None:
    (expected_out, expected), out = one, folder / engine
    printed, others = (rank[engine] for rank in two)
    assert others == dict.fromkeys(expected, "")
    assert printed.keys() == expected.keys()
    for name in ("evaluate", "attribution", "heads", "generate", "fit"):
        assert_near(json.loads(printed[name]), json.loads(expected[name]))
    files = sorted(strip(file.relative_to(expected_out)) for file in expected_out.rglob("*") if file.is_file())
    assert sorted(strip(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == files
    records = [read_sealed(root / "fit" / "fit.json") for root in (out, expected_out)]
    assert records[0]["weights"] == records[1]["weights"] is not None  # the digest of the whole model
    for name in ("fit/history.json", "attribution/attribution.json", "evaluation.json"):
        read = read_sealed if name.startswith("fit") else lambda file: json.loads(file.read_bytes())
        assert_near(read(out / name), read(expected_out / name))
    for name in ("fit", "heads", "extracted", "latent"):
        assert_same_intervention(af.load_intervention(out / name), af.load_intervention(expected_out / name))
    for name in ("sweep", "path"):
        found, wanted = (af.load_sweep(root / name).fits for root in (out, expected_out))
        assert len(found) == len(wanted) == 2
        for fit, other in zip(found, wanted, strict=True):
            assert_near(fit.settings, other.settings)
            assert_same_intervention(fit.intervention, other.intervention)
            assert fit.evaluation is not None
            assert_near(fit.evaluation.to_dict(), other.evaluation.to_dict())  # type: ignore[union-attr]
    assert_near(
        read_sealed(out / "path" / "path.json")["weights"], read_sealed(expected_out / "path" / "path.json")["weights"]
    )
    config = tomllib.loads((out / "fit" / "config.toml").read_text())
    assert {name: config[name] for name in ("tp", "fsdp") if name in config} == {
        option.removeprefix("--"): int(number)
        for option, number in zip(ENGINES[engine][::2], ENGINES[engine][1::2], strict=True)
    }


def assert_same_intervention(found: af.Intervention, expected: af.Intervention) -> None:
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def strip(file: Path) -> str:
    """A file's path, with a name in place of that of a sweep's point, which is a digest."""
    return re.sub(r"[0-9a-f]{8,}", "*", str(file))


def assert_near(found: object, expected: object, where: str = "") -> None:
    """Equal, numbers to 1e-4, but for times and places."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            if key not in ("seconds", "out", "weights"):  # one process cannot read the weights of a sharded model
                assert_near(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_near(found[number], value, f"{where}[{number}]")
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-5) if isinstance(expected, float) else expected), (
            where
        )


def test_a_shared_model_needs_its_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--task", "country-capital", "--out", str(tmp_path / "out")]
    assert (
        "--tp 2 needs 2 processes, and this is one; start them with torchrun --nproc-per-node 2 --no-python "
        "actscale-fast fit --tp 2 …"
    ) in refused(capsys, *words, "--tp", "2")
    assert "--tp 2 --fsdp 2 needs 4 processes" in refused(capsys, *words, "--tp", "2", "--fsdp", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert "error in process 1 of 3: --tp 2 needs 2 processes, but 3 were started" in refused(
        capsys, *words, "--tp", "2"
    )
    assert "merge runs in one process, but the environment has RANK=1 and WORLD_SIZE=3; start it without" in refused(
        capsys, "merge", "--intervention", "x", "--out", "y"
    )


def test_an_environment_of_something_else_is_named_where_it_matters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--task", "country-capital", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "auto")
    assert "the environment has RANK=0 and WORLD_SIZE=auto, expected numbers; unset both" in refused(capsys, *words)
    assert main(["completion", "bash"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "RANK=0 and WORLD_SIZE=2, but not MASTER_ADDR, by which the processes find each other" in refused(
        capsys, *words
    )
    assert main(["completion", "bash"]) == 0


def test_every_command_is_shared_or_refused_or_needs_no_other_process() -> None:
    from actscale_fast.cli.parser import build_parser
    from actscale_fast.cli.processes import COMMANDS, OTHERS

    harmless = {"completion", "doctor", "info", "plan", "serving", "verify"}
    found = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert found is not None
    assert sorted([*COMMANDS, *OTHERS, *harmless]) == sorted(found)


def test_a_plan_for_several_processes_needs_none_of_them(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["plan", "--model", str(folder / "model"), "--tokens", "16", "--tp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tp"] == 2


def test_warnings_of_another_process_are_printed_with_its_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from actscale_fast.cli.processes import _unseen
    from actscale_fast.cli.verbosity import printing

    options = argparse.Namespace(command="fit", out="..", plot=None, quiet=False, json=False)
    with _unseen(options, 1), printing(options):
        print("a result")
        warnings.warn("little memory", stacklevel=1)
        assert Path(options.out).name == "out"
    assert capsys.readouterr() == ("", "actscale-fast: process 1: warning: little memory\n")


@pytest.mark.skipif(not SAYS_HOW, reason="this transformers does not say how its weights are sharded")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tp", "2", "--device", "cpu"], "--tp chooses the device of each process itself, and cannot be used with"),
        (["--tp", "2", "--quantize", "torchao-int8"], "--tp cannot be used with a quantised model, which is loaded as"),
        (["--tp", "3"], "error: --tp 3 does not divide num_attention_heads=4 of "),
        (["--device-map", "auto"], "--device-map divides a model between the devices of one process, but several were"),
    ],
)
def test_a_model_that_processes_cannot_share_is_refused_before_it_is_loaded(
    more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from actscale_fast.architectures.sharding import ModelProcesses
    from actscale_fast.cli import processes

    monkeypatch.setattr(processes, "_check", lambda options, size: None)
    monkeypatch.setattr(processes, "_current", [ModelProcesses((0, 1), 0)])
    words = ["fit", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    assert message in refused(capsys, *words, "--out", str(tmp_path / "out"), *more)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from actscale_fast.cli import loading

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    others = [("elsewhere", "a"), ("elsewhere", "b"), ("elsewhere", "c")]
    processes = argparse.Namespace(size=4, rank=3, all_gather=lambda mine: [*others, mine])
    monkeypatch.setattr(loading, "current", lambda: processes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: argparse.Namespace(uuid=f"GPU-{place}"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert loading._device("auto") == loading._device("cuda") == torch.device("cuda", 1)
    assert chosen == [1, 1]
    with pytest.raises(ValueError, match=r"got 'cuda:0' for several processes, each of which needs a GPU of its own"):
        loading._device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"no GPU number 2 for process 3 \(this process sees 2; LOCAL_RANK=2, CUDA"):
        loading._device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as where a scheduler shows each process one
    assert loading._device("auto") == torch.device("cuda", 0)
    processes.all_gather = lambda mine: [mine, *others[1:], mine]
    with pytest.raises(ValueError, match=r"processes 0, 3 would share one GPU"):
        loading._device("auto")
