"""`completion` prints scripts; that of bash completes commands, options and their values in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from actscale_fast.cli import main
from actscale_fast.cli.options import SITES, TASKS
from actscale_fast.cli.parser import build_parser

#: Completes the last of the words that it is given, as bash does with the TAB key.
_PRESS = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _actscale_fast; printf "%s\\n" "${COMPREPLY[@]}"'


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    made = script("bash", capsys)

    def completed(*words: str) -> list[str]:
        command = ["bash", "--norc", "-c", f"set -u\n{made}\n{_PRESS}", "bash", "actscale-fast", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    parser = build_parser()
    fit, _ = parser.subparser(["fit"])
    assert completed("ev") == ["evaluate"]
    assert {"demo", "fit", "extract", "completion"} <= {*completed("")}
    assert completed("--v") == ["--version"]
    assert completed("extract", "ac") == ["act-add"]
    assert completed("extract", "act-add", "--posi") == ["--positive"]
    assert {*completed("fit", "--")} == {*fit.options}
    assert completed("fit", "--task", "") == [*TASKS]
    assert completed("fit", "--out", "o", "--kind", "st") == ["steer-vec"]
    assert completed("fit", "--kind", "=") == ["activ-scalar", "steer-vec", "dyn-scalar"]  # bash splits at the =
    assert completed("fit", "--kind", "=", "dyn") == ["dyn-scalar"]
    assert completed("sweep", "--site", "") == [*SITES]
    assert completed("completion", "") == ["bash", "zsh", "fish"]
    assert completed("fit", "--data", "") == []  # bash then offers files


def test_all_shells_know_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    assert "bashcompinit" in script("zsh", capsys)
    assert script("bash", capsys) in script("zsh", capsys)
    lines = script("fish", capsys).splitlines()
    (commands,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for name, command in commands.items():
        assert any(f" -f -a {name} -d " in line for line in lines)
        for option in command.options:
            start = f"complete -c actscale-fast -n '__fish_seen_subcommand_from {name}"
            assert any(line.startswith(start) and f" -l {option[2:]} " in line for line in lines), (name, option)


def test_another_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bsh"])
    assert stop.value.code == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err
