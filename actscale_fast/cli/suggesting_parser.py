"""A parser whose errors suggest the command, option or value that a misspelt one may have meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .._suggestions import closest

_CHOICE = re.compile(r"invalid choice: '(?P<got>[^']*)' \(choose from (?P<names>.*)\)", re.DOTALL)


class SuggestingParser(argparse.ArgumentParser):
    """`ArgumentParser` with suggestions; its subcommands are parsed alike."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        found = _CHOICE.search(message)
        meant = closest(found["got"], re.findall(r"[\w-]+", found["names"])) if found else None
        if meant is not None:
            super().error(f"{message}; did you mean {meant!r}?")
        super().error(message + self._hint(self._words))

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit because of words that are no option of this parser."""
        super().error(f"unrecognized arguments: {' '.join(words)}{self._hint(words)}")

    def _hint(self, words: Sequence[str]) -> str:
        """A suggestion for the first of these words that is no option but resembles one."""
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        for name in names:
            meant = None if name in self.options else closest(name, self.options)
            if meant is not None:
                return f"; did you mean {meant} instead of {name}?"
        return ""

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The options by their names, such as "--out"."""
        return {name: action for name, action in self._option_string_actions.items() if name.startswith("--")}

    def exclusive_with(self, actions: set[argparse.Action]) -> set[argparse.Action]:
        """The options that cannot be given together with these."""
        groups = [set(group._group_actions) for group in self._mutually_exclusive_groups]
        return {action for group in groups if group & actions for action in group}

    def subparser(self, words: Sequence[str]) -> tuple[SuggestingParser, int]:
        """The parser of the command (and recipe) that the words begin with, and how many of them name it."""
        parser, depth = self, 0
        while depth < len(words):
            choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
            if not choices or words[depth] not in choices[0]:
                break
            parser, depth = choices[0][words[depth]], depth + 1
        return parser, depth
