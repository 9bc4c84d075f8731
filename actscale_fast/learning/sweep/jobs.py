"""A grid that several jobs divide between them: `points.json` in their folder says what all of them work on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..._json import encoded, parsed, read_sealed, write_sealed
from .fit_folder import LOCK, is_folder_name
from .grid import Point
from .result import jsonable

PLAN = "points.json"
_FORMAT = 1


def share_of(points: object) -> tuple[int, int] | None:
    """(i, n) of "i/n", the i-th of n shares of a grid; None for None.

    Raises:
        TypeError, ValueError: something else; the message names the argument.
    """
    if points is None:
        return None
    if not isinstance(points, str):
        raise TypeError(f"points: got {type(points).__name__}, expected a share such as '2/4'")
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", points)
    number, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= n:
        example = f", that is one of '1/{n}' to '{n}/{n}'" if n else ""
        raise ValueError(f"points: got {points!r}, expected a share such as '2/4', counted from 1{example}")
    return number, n


def share(chains: Sequence[list[Point]], points: tuple[int, int]) -> list[list[Point]]:
    """The chains of one job; a path of warm-started fits stays in one job."""
    number, n = points
    return list(chains[number - 1 :: n])


def asked(settings: dict[str, Any], made: Sequence[Point]) -> dict[str, Any]:
    """What the jobs of a sweep must agree in, and the points as the grid gives them, before shares are resolved."""
    points = [{"label": point.label, "chosen": jsonable(point.chosen), "task": point.task} for point in made]
    found: dict[str, Any] = parsed(encoded({"settings": settings, "points": points}), finite=False)
    return found


def read_plan(root: Path) -> dict[str, Any] | None:
    """The content of `points.json`, or None if there is none.

    Raises:
        ValueError: the file was changed since it was written; the message names it.
        OSError: it cannot be read.
    """
    path = root / PLAN
    try:
        plan = read_sealed(path, finite=False)
    except FileNotFoundError:
        return None
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise ValueError(f"{path}: damaged, or written by another version")
    points, settings = plan.get("points"), plan.get("settings")
    if not isinstance(points, list) or not isinstance(settings, dict) or not all(map(_is_point, points)):
        raise ValueError(f"{path}: damaged (its points are no list of objects)")
    return plan


def _is_point(point: Any) -> bool:
    texts = ("label", "folder", "family")
    return (
        isinstance(point, dict)
        and all(isinstance(point.get(name), str) for name in texts)
        and isinstance(point.get("minimality"), int | float | None)
        and is_folder_name(point["folder"])
    )


def check_same(root: Path, plan: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a job that has other settings than the others, or other points.

    A grid that has grown is accepted, and so is the earlier grid of one that has grown since.

    Raises:
        ValueError: they differ; the message names the settings.
    """
    former, now = plan["settings"], wanted["settings"]
    other = [
        f"{name} {former.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(former.keys() | now.keys())
        if former.get(name) != now.get(name)
    ]
    if other:
        raise ValueError(
            f"folder: {root} belongs to jobs with other settings: {'; '.join(other)[:1000]}; give all jobs the "
            "same, or name another folder"
        )
    before, after = (_keys(some["points"]) for some in (plan, wanted))
    if not (before <= after or after <= before):
        raise ValueError(
            f"folder: the jobs of {root} have other points ({min(before - after)[:200]} is not among these, "
            f"{min(after - before)[:200]} is new); give all jobs the same grid, or name another folder"
        )


def take_weights(plan: dict[str, Any], made: Sequence[Point]) -> None:
    """Take the weights that shares of λ_max were found to be from the job that began first.

    Another processor would round them otherwise, and the points of two jobs would not be the same.
    """
    known = {_key(point): point.get("minimality") for point in plan["points"]}
    for point in made:
        told = {"label": point.label, "chosen": jsonable(point.chosen), "task": point.task}
        point.known_weight = known.get(_key(told))


def check_folders(root: Path, plan: dict[str, Any], wanted: dict[str, Any], made: Sequence[Point]) -> None:
    """Refuse a job whose fits would not be those of the others, because they start from other values.

    Args:
        root, plan: the folder of the sweep, and its `points.json`.
        wanted: what `asked` returned for these points.
        made: the points, whose folders are known now.

    Raises:
        ValueError: a point has another folder than it has for the other jobs.
    """
    known = {_key(point): point for point in plan["points"]}
    for told, point in zip(wanted["points"], made, strict=True):
        other = known.get(_key(told))
        if other is None or other.get("minimality") is None or point.error is not None:
            continue
        if other["folder"] != point.folder:
            raise ValueError(
                f"folder: the jobs of {root} fit {point.label} in {other['folder']}, but this job would in "
                f"{point.folder}; give all jobs the same starting values, or name another folder"
            )


def write_plan(root: Path, wanted: dict[str, Any], made: Sequence[Point], held_out: dict[str | None, str]) -> None:
    """Write `points.json`.

    Args:
        root: the folder of the sweep.
        wanted: what `asked` returned for these points.
        made: the points, whose folders are known now.
        held_out: digests of the held-out examples by task; empty if nothing is evaluated.
    """
    points = [
        told
        | {
            "folder": point.folder, "family": point.family,
            "minimality": None if point.error else point.objective.minimality,  # it is not known after an error
            "evaluated_on": held_out.get(point.task),
        }
        for told, point in zip(wanted["points"], made, strict=True)
    ]  # fmt: skip
    write_sealed(root / PLAN, {"format": _FORMAT, "settings": wanted["settings"], "points": points})


def is_newer(plan: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether the grid of this job is not in `points.json` yet, or has grown."""
    return plan is None or not _keys(wanted["points"]) <= _keys(plan["points"])


def root_lock(root: Path) -> Path:
    """The lock of what all jobs write: `points.json` and the index."""
    return root / LOCK


def _key(point: dict[str, Any]) -> str:
    told = [point["label"], *(point.get(name) for name in ("chosen", "task"))]
    return json.dumps(told, sort_keys=True, ensure_ascii=False)


def _keys(points: Sequence[dict[str, Any]]) -> set[str]:
    return {_key(point) for point in points}


def family_of(point: Point, warm_start: bool) -> list[Any]:
    """What the points of one grid have in common beside model and examples: all that the grid does not vary."""
    varied = set(point.chosen)
    common = point.settings.to_dict() | asdict(point.objective)
    kept: list[Any] = [sorted(varied), warm_start, {name: common[name] for name in sorted(common.keys() - varied)}]
    if "start" not in varied:
        place = point.intervention.location.to_dict()
        kept += [type(point.intervention).__name__, {name: place[name] for name in sorted(place.keys() - varied)}]
    return kept


def by_text(value: Any) -> Any:
    """A dict whose keys may be None, the name of a single set of examples, with text instead."""
    if isinstance(value, dict):
        return {"" if name is None else name: by_text(one) for name, one in value.items()}
    return value
