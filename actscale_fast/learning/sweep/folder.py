"""The folder of a sweep: finished fits, and an index of all of them.

There is one subfolder per fit: the intervention as `save_pretrained` writes it, `history.json`, and finally
`summary.json`, which marks the fit as finished and holds the checksums of both. `evaluation.json` is there if the fit
was evaluated, `state.safetensors` while it is running. All files are written atomically; a file that was changed since
raises an error that names it. In particular, a damaged evaluation is not silently recomputed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..._json import LARGEST, parsed, read_limited, read_sealed, write_json, write_sealed
from ...interventions import Intervention, load_intervention
from ...interventions.saving import DESCRIPTION, inside
from ...tasks.examples import Example
from .. import checkpoint as checkpoints
from ..evaluate import Evaluation
from .grid import Point
from .result import SweepFit, SweepResult

FIT, HISTORY, EVALUATION, INDEX = "summary.json", "history.json", "evaluation.json", "sweep.json"


def finished(root: Path, point: Point) -> SweepFit | None:
    """The result of a point that the folder already holds, or None.

    Raises:
        ValueError: one of its files was changed or is missing; the message names it.
        OSError: a file cannot be read; the message names it.
    """
    folder = root / point.folder
    try:
        summary = _read_summary(folder)
        if summary is None:
            return None
        _check_told(folder / FIT, summary, point.folder)
        intervention, history = _read_learned(folder, FIT, summary)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"folder: {folder} is damaged ({error}); delete it to fit this point again") from None
    return SweepFit.of(point, intervention.to(point.intervention.device), history)


def write_finished(root: Path, fit: SweepFit) -> None:
    """Write a finished fit; `summary.json`, which holds the checksums of the other files, commits it."""
    folder = root / fit.folder
    files = _write_learned(folder, fit)
    write_sealed(folder / FIT, fit.to_dict() | {"files": files})


def write_evaluation(root: Path, fit: SweepFit, test_digest: str) -> None:
    """Write the evaluation of a fit, with digests of the examples and of the intervention."""
    assert fit.evaluation is not None
    folder = root / fit.folder
    content = {
        "examples": test_digest,
        "intervention": _digest(folder / DESCRIPTION),
        "evaluation": fit.evaluation.to_dict(),
    }
    write_sealed(folder / EVALUATION, content)


def read_evaluation(root: Path, fit: SweepFit, test_digest: str) -> Evaluation | None:
    """The stored evaluation on these examples, or None.

    Raises:
        ValueError: the file was changed or belongs to another intervention; evaluating again would hide that.
        OSError: the file cannot be read; the message names it.
    """
    path = root / fit.folder / EVALUATION
    try:
        examples, evaluation = _read_evaluation(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; delete it to evaluate this fit again") from None
    return evaluation if examples == test_digest else None


def digest_of(examples: Sequence[Example]) -> str:
    """What tells one set of examples from another."""
    return checkpoints.digest([asdict(example) for example in examples])


def write_index(root: Path, result: SweepResult) -> None:
    """Write `sweep.json`, a list of all fits with their folders; failed fits are saved in the state they reached.

    The first key of the list's first object is the checksum of the file.
    """
    told = []
    for fit in result.fits:
        folder = root / fit.folder
        if fit.error is None:
            files = {name: _digest(folder / name) for name in (HISTORY, DESCRIPTION)}
        else:
            files = _write_learned(folder, fit)
        told.append(fit.to_dict() | {"files": files})
    write_sealed(root / INDEX, told)


def load_sweep(folder: str | os.PathLike[str]) -> SweepResult:
    """Read what a finished sweep left in its folder; interventions are on the CPU.

    Raises:
        FileNotFoundError: no `sweep.json` there.
        ValueError: a file was changed since it was written, or is missing; the message names it.
        OSError: a file cannot be read; the message names it.
    """
    root = Path(folder)
    if not os.path.lexists(root / INDEX):
        raise FileNotFoundError(f"folder: there is no {INDEX} in {root}, expected the folder of a finished sweep")
    fits = []
    try:
        told = _read(root / INDEX, root)
        if not isinstance(told, list):
            raise ValueError(f"{root / INDEX}: damaged (no list of fits)")
        seen: dict[str, tuple[dict[str, Any], SweepFit]] = {}
        for entry in told:
            _check_told(root / INDEX, entry)
            name = entry["folder"]
            if name not in seen:
                seen[name] = entry, _told_fit(root, entry)
            if seen[name][0] != entry:
                raise ValueError(f"{root / INDEX}: damaged ({ascii(name)[:100]} is listed twice, differently)")
            fits.append(copy.copy(seen[name][1]))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"folder: {root} is damaged ({error})") from None
    return SweepResult(fits, 0.0)


def _told_fit(root: Path, entry: dict[str, Any]) -> SweepFit:
    """Read a fit listed in the index."""
    place = root / entry["folder"]
    if place.is_symlink():
        raise ValueError(f"{place}: a link, expected a folder")
    if entry["error"] is None:
        _check_summary(place, entry)
    intervention, history = _read_learned(place, INDEX, entry)
    evaluation = _told_evaluation(root / INDEX, place, entry)
    return SweepFit(
        entry["label"], entry["chosen"], entry["task"], entry["settings"], intervention, history,
        entry["folder"], evaluation, entry["error"],
    )  # fmt: skip


def _write_learned(folder: Path, fit: SweepFit) -> dict[str, str]:
    """Write a fit's intervention and history; returns their checksums by name."""
    if os.path.lexists(folder / EVALUATION) and not os.path.lexists(folder / FIT):
        (folder / EVALUATION).unlink()  # that of a fit that was deleted
    fit.intervention.save_pretrained(folder)
    write_json(folder / HISTORY, fit.history)
    return {name: _digest(folder / name) for name in (HISTORY, DESCRIPTION)}


def _read_summary(folder: Path) -> Any:
    """The contents of `summary.json`, or None if there is none."""
    try:
        return _read(folder / FIT, folder)
    except FileNotFoundError:
        return None


def _read(path: Path, folder: Path) -> Any:
    inside(folder, path.name)
    return read_sealed(path, finite=False)


def _read_learned(folder: Path, teller: str, told: dict[str, Any]) -> tuple[Intervention, list[dict[str, float]]]:
    """The intervention and history in a folder, which must match the checksums in the summary or the index."""
    history = read_limited(inside(folder, HISTORY), LARGEST)
    if hashlib.sha256(history).hexdigest() != told["files"][HISTORY]:
        raise ValueError(f"{folder / HISTORY}: damaged, its checksum is not the one in {teller}")
    if _digest(inside(folder, DESCRIPTION)) != told["files"][DESCRIPTION]:
        raise ValueError(f"{folder / DESCRIPTION}: damaged, its checksum is not the one in {teller}")
    try:
        records = parsed(history, finite=False)
    except ValueError as error:
        raise ValueError(f"{folder / HISTORY}: damaged ({error})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{folder / HISTORY}: damaged (no list of records)")
    return load_intervention(folder), records


def _check_summary(folder: Path, entry: dict[str, Any]) -> None:
    """Refuse a `summary.json` that disagrees with the index."""
    summary = _read(folder / FIT, folder)
    same = (
        "label",
        "chosen",
        "task",
        "settings",
        "folder",
        "files",
        "steps",
        "last",
    )  # not the sums, whose rounding depends on the device
    if not isinstance(summary, dict) or any(summary.get(name) != entry.get(name) for name in same):
        raise ValueError(f"{folder / FIT}: damaged, or of another fit than the one in {INDEX}")


def _check_told(path: Path, told: Any, folder: str | None = None) -> None:
    """Refuse a summary with fields of wrong types, or one that belongs to another folder."""
    kinds = {
        "label": str, "chosen": dict, "task": str | None, "settings": dict, "folder": str, "error": str | None,
        "files": dict, "evaluation": dict | None,
    }  # fmt: skip
    if not isinstance(told, dict):
        raise ValueError(f"{path}: damaged (a fit is no object)")
    for name, kind in kinds.items():
        if name not in told or not isinstance(told[name], kind):
            raise ValueError(f"{path}: damaged ({name} is missing or of a wrong type)")
    name = told["folder"]
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ValueError(f"{path}: damaged (the folder is {ascii(name)[:100]}, expected a name)")
    if folder not in (None, name):
        raise ValueError(f"{path}: of another fit, {ascii(name)[:100]}")
    if told["files"].keys() != {HISTORY, DESCRIPTION}:
        raise ValueError(f"{path}: damaged (files is not {HISTORY} and {DESCRIPTION})")


def _told_evaluation(path: Path, folder: Path, entry: dict[str, Any]) -> Evaluation | None:
    """The evaluation in the index; the file in the fit's own folder must be intact too."""
    if entry["evaluation"] is None:
        return None
    _read_evaluation(folder / EVALUATION)
    return _evaluation(path, entry["evaluation"])


def _read_evaluation(path: Path) -> tuple[str, Evaluation]:
    """(digest of the examples, evaluation) from a fit's folder."""
    kept = _read(path, path.parent)
    if not isinstance(kept, dict) or kept.keys() != {"examples", "intervention", "evaluation"}:
        raise ValueError(f"{path}: damaged (not the evaluation of a fit)")
    if kept["intervention"] != _digest(path.parent / DESCRIPTION):
        raise ValueError(f"{path}: damaged, or of another intervention than {DESCRIPTION}")
    return str(kept["examples"]), _evaluation(path, kept["evaluation"])


def _evaluation(path: Path, data: Any) -> Evaluation:
    names = {item.name for item in fields(Evaluation)}
    for one in (data, data.get("baseline") if isinstance(data, dict) else None):
        if one is None and one is not data:
            continue
        numbers = [value for name, value in one.items() if name != "baseline"] if isinstance(one, dict) else [None]
        if not isinstance(one, dict) or one.keys() != names or any(type(v) not in (int, float) for v in numbers):
            raise ValueError(f"{path}: damaged (an evaluation's fields are missing or no numbers)")
        if one is not data and one["baseline"] is not None:
            raise ValueError(f"{path}: damaged (a baseline has one of its own)")
    return Evaluation.from_dict(data)


def _digest(path: Path) -> str:
    return hashlib.sha256(read_limited(path, LARGEST)).hexdigest()
