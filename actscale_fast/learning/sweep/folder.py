"""The folder of a sweep: a folder for each fit (see `fit_folder`), and `sweep.json`, the index of all of them.

The index is rebuilt from the folders: beside the fits of a call it holds those that other calls have finished with
other points of the same grid, which is what `family` in their summaries says.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._files import remove_stale_temporaries
from ..._json import write_sealed
from ..._locks import locked, try_lock
from ..._log import notice
from .fit_folder import (
    LOCK,
    SUMMARY,
    check_entry,
    checked_evaluation,
    entry,
    finished_folders,
    learned_checksums,
    read_inside,
    read_learned,
    stored_evaluation,
    write_learned,
)
from .jobs import PLAN, read_plan, root_lock
from .result import SweepFit, SweepResult

INDEX = "sweep.json"
#: Fields in which a fit's summary agrees with the index; sums such as the ℓ1 norm depend on the device's rounding.
_SAME = ("label", "chosen", "task", "settings", "folder", "files", "steps", "last")


def write_index(
    root: Path, result: SweepResult, family: str = "", held_out: Mapping[str | None, str] | None = None
) -> None:
    """Write `sweep.json`, a list of all fits with their folders; failed fits are saved in the state they reached.

    The first key of the list's first object is the checksum of the file.

    Args:
        root: the folder of the sweep.
        result: the fits of this call, which come first.
        family: of which other finished fits in the folder follow, in the order of their names.
        held_out: digests of the held-out examples by task, if the fits were evaluated.
    """
    with locked(root_lock(root), f"the index of {root}"):
        entries = []
        for fit in result.fits:
            folder = root / fit.folder
            files = learned_checksums(folder) if fit.error is None else write_learned(folder, fit)
            entries.append(fit.to_dict() | {"files": files})
        known = {fit.folder for fit in result.fits}
        for name in sorted(finished_folders(root) - known) if family else ():
            try:
                other = _entry_of_family(root, name, family, held_out or {})
            except (ValueError, OSError) as error:
                notice(f"sweep: {root / INDEX} leaves out {name}: {error}")
                continue
            entries += [other] if other is not None else []
        write_sealed(root / INDEX, entries)


def _entry_of_family(root: Path, name: str, family: str, held_out: Mapping[str | None, str]) -> dict[str, Any] | None:
    """The entry of another finished fit, or None if it belongs to another grid or was evaluated on other examples."""
    found = entry(root, name)
    if found is None or found[1] != family:
        return None
    expected = held_out.get(found[0]["task"])
    return with_evaluation(root, found[0], expected) if expected is not None else found[0]


def with_evaluation(root: Path, fit: dict[str, Any], expected: str) -> dict[str, Any] | None:
    """A fit's entry with its evaluation on the examples of that digest; None if it was not evaluated on them."""
    if fit["error"] is not None:
        return fit
    try:
        examples, evaluation = stored_evaluation(root / fit["folder"])
    except FileNotFoundError:
        return None
    return fit | {"evaluation": evaluation.to_dict()} if examples == expected else None


def unfinished(root: Path, plan: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """(the entries of the index that are there, what is missing in words) of the points that jobs work on."""
    entries, missing = [], []
    for point in plan["points"]:
        found = entry(root, point["folder"])
        if found is None:
            missing.append(f"{point['label']} ({point['folder']})")
            continue
        if found[1] != point["family"]:
            raise ValueError(f"folder: {root / point['folder']} was fitted with other settings than {PLAN} says")
        expected = point.get("evaluated_on")
        evaluated = found[0] if expected is None else with_evaluation(root, found[0], expected)
        if evaluated is None:
            missing.append(f"{point['label']} ({point['folder']}), which is not evaluated yet")
        else:
            entries.append(evaluated)
    return entries, missing


def close_jobs(root: Path) -> None:
    """Write the index if all points of the jobs are finished; otherwise say how many are."""
    with locked(root_lock(root), f"the index of {root}"):
        plan = read_plan(root)
        assert plan is not None
        entries, missing = unfinished(root, plan)
        if not missing:
            write_sealed(root / INDEX, entries)
            return
    notice(f"sweep: {len(entries)} of {len(plan['points'])} points in {root} are finished; the last job writes {INDEX}")


def gather_sweep(folder: str | os.PathLike[str]) -> SweepResult:
    """Check that the jobs of a sweep have finished every point, write the index of all of them, and read it.

    Neither the model nor the examples are needed. Without `points.json`, which `sweep(points=…)` writes, all finished
    fits in the folder are taken, which must then differ in nothing but the grid, and be evaluated on the same examples.

    Args:
        folder: the folder of a sweep whose points several jobs have divided between them.

    Returns:
        The fits in the grid's order (without `points.json`, in the order of their folders), on the CPU.

    Raises:
        FileNotFoundError: there is no such folder, or no fit in it.
        ValueError: points are missing, or not evaluated, which are named; the fits cannot be compared; or a file was
            changed since it was written.

    Example:
        >>> af.sweep(model, tokenizer, train, grid, folder="sweep", points="1/2")  # and "2/2" in another job
        >>> result = af.gather_sweep("sweep")
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {root}")
    with locked(root_lock(root), f"the index of {root}"):
        plan = read_plan(root)
        entries, missing = _without_plan(root) if plan is None else unfinished(root, plan)
        if missing:
            first = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(
                f"folder: {len(missing)} of {len(missing) + len(entries)} points in {root} are not finished: {first}; "
                "run their jobs again"
            )
        write_sealed(root / INDEX, entries)
    return load_sweep(root)


def _without_plan(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The same for parts of a grid that were fitted by separate calls."""
    families: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(finished_folders(root)):
        found = entry(root, name)
        assert found is not None
        families.setdefault(found[1], []).append(found[0])
    if not families:
        raise FileNotFoundError(f"folder: there is no finished fit in {root}")
    if "" in families:
        raise ValueError(
            f"folder: {root / families[''][0]['folder']} was fitted by an earlier version, which did not record what "
            f"the fits of a grid have in common; run the sweep again: it keeps them, and writes {INDEX}"
        )
    if len(families) > 1:
        (first, *_), (other, *_) = sorted(families.values(), key=len)[:2]
        differ = [
            f"{name} {first['settings'].get(name)!r} and {other['settings'].get(name)!r}"
            for name in sorted(first["settings"].keys() | other["settings"].keys())
            if first["settings"].get(name) != other["settings"].get(name) and name not in first["chosen"]
        ]
        raise ValueError(
            f"folder: the fits in {root} belong to {len(families)} grids; {first['folder']} and {other['folder']} "
            f"differ in {'; '.join(differ) or 'the model, the examples, the places or the names of their grids'}"
        )
    ((entries,),) = (families.values(),)
    return _evaluated_alike(root, entries)


def _evaluated_alike(root: Path, entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(the fits with their evaluations, those without one in words); none may have been evaluated on other examples."""
    made: list[dict[str, Any]] = []
    without: list[str] = []
    first: dict[str | None, tuple[str, str]] = {}  # (digest of the examples, folder) by task
    for fit in entries:
        try:
            examples, evaluation = stored_evaluation(root / fit["folder"])
        except FileNotFoundError:
            made.append(fit)
            without.append(f"{fit['label']} ({fit['folder']}), which is not evaluated yet")
            continue
        known, other = first.setdefault(fit["task"], (examples, fit["folder"]))
        if known != examples:
            raise ValueError(f"folder: in {root}, {other} and {fit['folder']} were evaluated on different examples")
        made.append(fit | {"evaluation": evaluation.to_dict()})
    if not first:
        return made, []
    return [fit for fit in made if fit["evaluation"] is not None], without


def clear(root: Path) -> None:
    """Remove the temporaries and locks that killed processes left in the folder of a sweep and those of its fits."""
    if root.is_dir():
        for folder in (root, *(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())):
            remove_stale_temporaries(folder)
            lock = try_lock(folder / LOCK) if (folder / LOCK).exists() else None
            if lock is not None:
                lock.release()


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
        jobs = (
            " (its jobs have not finished: gather_sweep says what is missing)" if os.path.lexists(root / PLAN) else ""
        )
        raise FileNotFoundError(f"folder: there is no {INDEX} in {root}, expected the folder of a finished sweep{jobs}")
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
