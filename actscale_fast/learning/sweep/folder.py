"""The folder of a sweep: a folder for each fit (see `fit_folder`), and `sweep.json`, the index of all of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from ..._json import write_sealed
from .fit_folder import (
    SUMMARY,
    check_entry,
    checked_evaluation,
    learned_checksums,
    read_inside,
    read_learned,
    stored_evaluation,
    write_learned,
)
from .result import SweepFit, SweepResult

INDEX = "sweep.json"
#: Fields in which a fit's summary agrees with the index; sums such as the ℓ1 norm depend on the device's rounding.
_SAME = ("label", "chosen", "task", "settings", "folder", "files", "steps", "last")


def write_index(root: Path, result: SweepResult) -> None:
    """Write `sweep.json`, a list of all fits with their folders; failed fits are saved in the state they reached.

    The first key of the list's first object is the checksum of the file.
    """
    entries = []
    for fit in result.fits:
        folder = root / fit.folder
        files = learned_checksums(folder) if fit.error is None else write_learned(folder, fit)
        entries.append(fit.to_dict() | {"files": files})
    write_sealed(root / INDEX, entries)


def load_sweep(folder: str | os.PathLike[str]) -> SweepResult:
    """Read what a finished sweep left in its folder; interventions are on the CPU.

    Raises:
        FileNotFoundError: there is no `sweep.json`.
        ValueError: a file was changed since it was written, or is missing; the message names it.
        OSError: a file cannot be read; the message names it.
    """
    root = Path(folder)
    index = root / INDEX
    if not os.path.lexists(index):
        raise FileNotFoundError(f"folder: there is no {INDEX} in {root}, expected the folder of a finished sweep")
    fits = []
    try:
        entries = read_inside(root, INDEX)
        if not isinstance(entries, list):
            raise ValueError(f"{index}: damaged (no list of fits)")
        seen: dict[str, tuple[dict[str, Any], SweepFit]] = {}
        for entry in entries:
            check_entry(index, entry)
            name = entry["folder"]
            if name not in seen:
                seen[name] = entry, _read_fit(root, entry)
            if seen[name][0] != entry:
                raise ValueError(f"{index}: damaged ({ascii(name)[:100]} is listed twice, differently)")
            fits.append(copy.copy(seen[name][1]))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"folder: {root} is damaged ({error})") from None
    return SweepResult(fits, 0.0)


def _read_fit(root: Path, entry: dict[str, Any]) -> SweepFit:
    """The fit of an entry of the index."""
    folder = root / entry["folder"]
    if folder.is_symlink():
        raise ValueError(f"{folder}: a link, expected a folder")
    if entry["error"] is None:
        summary = read_inside(folder, SUMMARY)
        if not isinstance(summary, dict) or any(summary.get(name) != entry.get(name) for name in _SAME):
            raise ValueError(f"{folder / SUMMARY}: damaged, or of another fit than the one in {INDEX}")
    intervention, history = read_learned(folder, INDEX, entry)
    evaluation = None
    if entry["evaluation"] is not None:
        stored_evaluation(folder)  # the file in the fit's own folder must be intact too
        evaluation = checked_evaluation(root / INDEX, entry["evaluation"])
    return SweepFit(
        entry["label"], entry["chosen"], entry["task"], entry["settings"], intervention, history,
        entry["folder"], evaluation, entry["error"],
    )  # fmt: skip
