"""The folder of one fit of a sweep.

It holds the intervention as `save_pretrained` writes it, `history.json`, and finally `summary.json`, which marks the
fit as finished and holds the checksums of both. `evaluation.json` is there if the fit was evaluated,
`state.safetensors` and a lock while it is running, `failure.json` if it ended with an error. All files are written
atomically; a file that was changed since raises an error that names it. In particular, a damaged evaluation is not
silently recomputed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..._json import LARGEST, parsed, read_limited, read_sealed, write_json, write_sealed
from ...interventions import Intervention, load_intervention
from ...interventions.description import DESCRIPTION, inside
from ...tasks.examples import Example, example_fields
from ..checkpoint import digest
from ..evaluate import Evaluation
from .grid import Point
from .result import SweepFit

SUMMARY, HISTORY, EVALUATION = "summary.json", "history.json", "evaluation.json"
#: In place of the summary of a fit that ended with an error; it is tried again.
FAILURE = "failure.json"
LOCK = ".lock"

_FIELDS = {
    "label": str, "chosen": dict, "task": str | None, "settings": dict, "folder": str, "error": str | None,
    "files": dict, "evaluation": dict | None,
}  # fmt: skip


def finished(root: Path, point: Point) -> SweepFit | None:
    """The result of a point that the sweep's folder already holds, or None.

    Raises:
        ValueError: one of its files was changed or is missing; the message names it.
        OSError: a file cannot be read; the message names it.
    """
    folder = root / point.folder
    if not os.path.lexists(folder / SUMMARY):
        return None
    try:
        summary = read_inside(folder, SUMMARY)
        check_entry(folder / SUMMARY, summary, point.folder)
        intervention, history = read_learned(folder, SUMMARY, summary)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"folder: {folder} is damaged ({error}); delete it to fit this point again") from None
    return SweepFit.of(point, intervention.to(point.intervention.device), history)


def finished_folders(root: Path) -> set[str]:
    """The names of the folders of finished fits in the folder of a sweep."""
    return {path.parent.name for path in root.glob(f"*/{SUMMARY}")}


def write_finished(root: Path, fit: SweepFit, family: str = "") -> None:
    """Write a finished fit; `summary.json`, which holds the checksums of the other files, commits it.

    A fit with an error gets `failure.json` instead, and is saved in the state that it reached.
    """
    folder = root / fit.folder
    files = write_learned(folder, fit)
    write_sealed(folder / (FAILURE if fit.error else SUMMARY), fit.to_dict() | {"files": files, "family": family})
    if fit.error is None:
        (folder / FAILURE).unlink(missing_ok=True)


def entry(root: Path, name: str) -> tuple[dict[str, Any], str] | None:
    """(what the index says about a fit, except for its evaluation; the family of its grid), or None if it is not there.

    Raises:
        ValueError: a file was changed or is missing; the message names it.
        OSError: a file cannot be read; the message names it.
    """
    folder = root / name
    if folder.is_symlink():
        raise ValueError(f"{folder}: a link, expected a folder")
    listed_in = next((file for file in (SUMMARY, FAILURE) if os.path.lexists(folder / file)), None)
    if listed_in is None:
        return None
    try:
        found = read_inside(folder, listed_in)
        check_entry(folder / listed_in, found, name)
        if found["files"] != learned_checksums(folder):
            raise ValueError(f"{folder}: {HISTORY} or {DESCRIPTION} is damaged")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"folder: {folder} is damaged ({error}); delete it to fit this point again") from None
    family = found.pop("family", "")  # fits of earlier versions have none
    return found, str(family)


def write_learned(folder: Path, fit: SweepFit) -> dict[str, str]:
    """Write a fit's intervention and history; returns their checksums by name."""
    if os.path.lexists(folder / EVALUATION) and not os.path.lexists(folder / SUMMARY):
        (folder / EVALUATION).unlink()  # it belongs to a fit that was deleted
    fit.intervention.save_pretrained(folder)
    write_json(folder / HISTORY, fit.history)
    return learned_checksums(folder)


def read_learned(folder: Path, listed_in: str, entry: dict[str, Any]) -> tuple[Intervention, list[dict[str, float]]]:
    """The intervention and history in a folder, which must match the checksums in an entry of a summary or index."""
    history = read_limited(inside(folder, HISTORY), LARGEST)
    if hashlib.sha256(history).hexdigest() != entry["files"][HISTORY]:
        raise ValueError(f"{folder / HISTORY}: damaged, its checksum is not the one in {listed_in}")
    if _checksum(inside(folder, DESCRIPTION)) != entry["files"][DESCRIPTION]:
        raise ValueError(f"{folder / DESCRIPTION}: damaged, its checksum is not the one in {listed_in}")
    try:
        records = parsed(history, finite=False)
    except ValueError as error:
        raise ValueError(f"{folder / HISTORY}: damaged ({error})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{folder / HISTORY}: damaged (no list of records)")
    return load_intervention(folder), records


def learned_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a fit's history and intervention, by file name."""
    return {name: _checksum(folder / name) for name in (HISTORY, DESCRIPTION)}


def write_evaluation(root: Path, fit: SweepFit, examples_digest: str) -> None:
    """Write the evaluation of a fit, with digests of the examples and of the intervention."""
    assert fit.evaluation is not None
    folder = root / fit.folder
    content = {
        "examples": examples_digest,
        "intervention": _checksum(folder / DESCRIPTION),
        "evaluation": fit.evaluation.to_dict(),
    }
    write_sealed(folder / EVALUATION, content)


def read_evaluation(root: Path, fit: SweepFit, examples_digest: str) -> Evaluation | None:
    """The stored evaluation on these examples, or None.

    Raises:
        ValueError: the file was changed or belongs to another intervention; evaluating again would hide that.
        OSError: the file cannot be read; the message names it.
    """
    try:
        examples, evaluation = stored_evaluation(root / fit.folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; delete it to evaluate this fit again") from None
    return evaluation if examples == examples_digest else None


def stored_evaluation(folder: Path) -> tuple[str, Evaluation]:
    """(digest of the examples, evaluation) from a fit's folder."""
    path = folder / EVALUATION
    stored = read_inside(folder, EVALUATION)
    if not isinstance(stored, dict) or stored.keys() != {"examples", "intervention", "evaluation"}:
        raise ValueError(f"{path}: damaged (not the evaluation of a fit)")
    if stored["intervention"] != _checksum(folder / DESCRIPTION):
        raise ValueError(f"{path}: damaged, or of another intervention than {DESCRIPTION}")
    return str(stored["examples"]), checked_evaluation(path, stored["evaluation"])


def checked_evaluation(path: Path, data: Any) -> Evaluation:
    """The evaluation that a file describes; one that an earlier version wrote lacks the newer fields."""
    for one in (data, data.get("baseline") if isinstance(data, dict) else None):
        if one is None and one is not data:
            continue
        if not isinstance(one, dict) or not _is_evaluation(one):
            raise ValueError(f"{path}: damaged (an evaluation's fields are missing or not numbers)")
        if one is not data and one["baseline"] is not None:
            raise ValueError(f"{path}: damaged (a baseline has one of its own)")
    return Evaluation.from_dict(data)


def _is_evaluation(data: dict[str, Any]) -> bool:
    """Whether this object has the fields of an evaluation, with values of their types."""
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(Evaluation)}
    needed = {name for name, is_needed in known.items() if is_needed} | {"baseline"}
    if data.keys() - known.keys() or needed - data.keys():
        return False
    ends = data.get("intervals", {})
    if not isinstance(ends, dict) or not all(isinstance(pair, list) and len(pair) == 2 for pair in ends.values()):
        return False
    numbers = [end for pair in ends.values() for end in pair]
    for name, value in data.items():
        if name not in ("baseline", "intervals") and (known[name] or value is not None):
            numbers.append(value)
    return all(type(number) in (int, float) for number in numbers)


def check_entry(path: Path, entry: Any, folder: str | None = None) -> None:
    """Refuse a fit's entry with fields of wrong types, or one that belongs to another folder."""
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: damaged (a fit is not an object)")
    for name, kind in _FIELDS.items():
        if name not in entry or not isinstance(entry[name], kind):
            raise ValueError(f"{path}: damaged ({name} is missing or of a wrong type)")
    name = entry["folder"]
    if not is_folder_name(name):
        raise ValueError(f"{path}: damaged (the folder is {ascii(name)[:100]}, expected a name)")
    if folder not in (None, name):
        raise ValueError(f"{path}: of another fit, {ascii(name)[:100]}")
    if entry["files"].keys() != {HISTORY, DESCRIPTION}:
        raise ValueError(f"{path}: damaged (files is not {HISTORY} and {DESCRIPTION})")


def is_folder_name(name: str) -> bool:
    """Whether a name from a file is that of a folder in the sweep's own."""
    return name not in ("", ".", "..") and re.search(r"[/\\\0]", name) is None


def read_inside(folder: Path, name: str) -> Any:
    """The content of a sealed JSON file, which must not be a link that leads out of the folder."""
    return read_sealed(inside(folder, name), finite=False)


def examples_digest(examples: Sequence[Example]) -> str:
    """A digest of the examples of an evaluation."""
    # A source of None is part of the digest, as it was before examples had messages.
    return digest([example_fields(example) | {"source": example.source} for example in examples])


def _checksum(path: Path) -> str:
    return hashlib.sha256(read_limited(path, LARGEST)).hexdigest()
