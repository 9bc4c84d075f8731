"""Stages of a long run whose results are files: what is there is not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._json import write_json


class Stages:
    """Named results in a folder, each JSON with the settings that it belongs to.

    Args:
        folder: made where it is not there.
        settings: of the whole run, as JSON has them; results of other settings are refused.

    Raises:
        ValueError: the folder holds the results of another run.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "settings.json"
        if file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            differ = sorted(name for name in there.keys() | settings if there.get(name) != settings.get(name))
            if differ:
                raise ValueError(
                    f"out: {folder} holds a run with other settings ({', '.join(differ)} differ); choose another folder"
                )
        else:
            write_json(file, settings)

    def run(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a stage, from its file where there is one. A damaged file is computed again."""
        file = self.folder / "results" / f"{name}.json"
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))["result"]
            except (ValueError, KeyError, TypeError):
                pass
        begun = time.perf_counter()
        result = compute()
        write_json(file, {"seconds": round(time.perf_counter() - begun, 1), "result": result})
        return json.loads(file.read_text(encoding="utf-8"))["result"]

    @property
    def seconds(self) -> float:
        """Of all stages that are done."""
        files = sorted((self.folder / "results").glob("*.json"))
        return sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files)
