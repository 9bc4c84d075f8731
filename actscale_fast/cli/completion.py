"""`actscale-fast completion SHELL`: a script for the TAB key, made from the parser itself.

A library (argcomplete, shtab) would be one more dependency; argcomplete also starts Python at each press of the key.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from .parser import build_parser
from .suggesting_parser import SuggestingParser

#: With `-o default`, bash completes file names where this finds no words.
_BASH = """\
_actscale_fast() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" offered="" i
    if [[ $before == "=" ]]; then  # --option=word
        before="${COMP_WORDS[COMP_CWORD-2]}"
    elif [[ $word == "=" ]]; then
        word=""
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$command/${COMP_WORDS[i]}" in
@COMMANDS@
        esac
    done
    case "$command/$before" in
@VALUES@
    esac
    if [[ -z $offered ]]; then
        case "$command" in
@WORDS@
        esac
        if [[ $word == -* ]]; then offered="${offered%%|*}"; else offered="${offered#*|}"; fi
    fi
    COMPREPLY=($(compgen -W "$offered" -- "$word"))
}
complete -o default -F _actscale_fast actscale-fast
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class _Command:
    """A command with its options, and the commands below it with their descriptions."""

    path: tuple[str, ...]
    options: dict[str, argparse.Action]
    words: list[str]  # what may stand in the place of a word that is neither a file nor a folder
    below: dict[str, str]

    @property
    def name(self) -> str:
        return " ".join(self.path)


def completion(options: argparse.Namespace) -> int:
    """Print the script of a shell."""
    commands = list(_commands(build_parser(), ()))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](commands), end="")
    return 0


def _commands(parser: SuggestingParser, path: tuple[str, ...]) -> Iterator[_Command]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    described = {str(one.dest): str(one.help or "") for action in below for one in action._choices_actions}
    words = [word for action in parser._get_positional_actions() if action not in below for word in _choices(action)]
    yield _Command(path, parser.options, words, described)
    for action in below:
        for name, inner in action.choices.items():
            yield from _commands(inner, (*path, name))


def _choices(action: argparse.Action) -> list[str]:
    return list(map(str, action.choices or ()))


def _bash(commands: list[_Command]) -> str:
    steps, values, words = [], [], []
    for command in commands:
        for name in command.below:
            after = " ".join((*command.path, name))
            steps.append(f'            "{command.name}/{name}") command="{after}" ;;')
        for option, action in command.options.items():
            if _choices(action):
                values.append(f'        "{command.name}/{option}") offered="{" ".join(_choices(action))}" ;;')
        names = " ".join([*command.below, *command.words])
        words.append(f'            "{command.name}") offered="{" ".join(command.options)}|{names}" ;;')
    parts = {"@COMMANDS@": steps, "@VALUES@": values, "@WORDS@": words}
    script = _BASH
    for mark, lines in parts.items():
        script = script.replace(mark, "\n".join(lines))
    return script


def _zsh(commands: list[_Command]) -> str:
    return _ZSH + _bash(commands)


def _fish(commands: list[_Command]) -> str:
    lines = []
    for command in commands:
        seen = [f"__fish_seen_subcommand_from {name}" for name in command.path]
        if command.below:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(command.below)}")
        start = f"complete -c actscale-fast -n {shlex.quote('; and '.join(seen))}"
        for name, told in command.below.items():
            lines.append(f"{start} -f -a {name} -d {shlex.quote(told)}")
        if command.words:
            lines.append(f"{start} -f -a '{' '.join(command.words)}'")
        for option, action in command.options.items():
            told = shlex.quote((action.help or "").replace("%%", "%"))
            value = " -r" if action.nargs != 0 else ""
            if _choices(action):
                value = f" -x -a '{' '.join(_choices(action))}'"
            lines.append(f"{start} -l {option.removeprefix('--')}{value} -d {told}")
    return "\n".join(lines) + "\n"
