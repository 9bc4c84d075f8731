"""Stages of a long run, whose results are files and are computed once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._json import read_sealed, write_sealed


class Stages:
    """Named results in a folder, as JSON files.

    Args:
        folder: created if it does not exist.
        settings: the settings of the whole run, as JSON; results of other settings are refused.

    Raises:
        ValueError: the folder holds the results of another run, or its settings file was changed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        #: Duration in seconds of each stage that was run or read.
        self.taken: dict[str, float] = {}
        file = folder / "settings.json"
        if os.path.lexists(file):
            there = _read(file, "delete the folder to start again")
            differ = sorted(name for name in there.keys() | settings if there.get(name) != settings.get(name))
            if differ:
                raise ValueError(
                    f"out: {folder} holds a run with other settings ({', '.join(differ)} differ); choose another folder"
                )
        else:
            write_sealed(file, settings)

    def has(self, name: str) -> bool:
        """Whether the result of a stage is there."""
        return os.path.lexists(self._file(name))

    def _file(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def run(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a stage, read from its file if there is one.

        Raises:
            ValueError: the file was changed since it was written.
        """
        file = self._file(name)
        if not self.has(name):
            begun = time.perf_counter()
            result = compute()
            seconds = round(time.perf_counter() - begun, 1)
            write_sealed(file, {"stage": name, "seconds": seconds, "result": result})
        kept = _read(file, "delete it to compute this stage again")
        if kept.get("stage") != name or "result" not in kept:
            raise ValueError(f"{file}: belongs to another stage; delete it to compute this stage again")
        self.taken[name] = float(kept["seconds"])
        return kept["result"]

    @property
    def seconds(self) -> float:
        """The time of all stages that were run or read."""
        return sum(self.taken.values())


def _read(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = read_sealed(file, finite=False)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: damaged (no object)")
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    return content
