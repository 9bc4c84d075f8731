"""What the jobs of `actscale-fast sweep` share in their folder beside the fits: the path's weights, and records."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._json import read_sealed, write_sealed
from .._locks import locked
from ..architectures.model_origin import origin_of
from ..learning import Objective, SweepResult
from .processes import current
from .provenance import examples_record, provenance
from .record import FILE, read_record, save_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..interventions import Intervention
    from ..tasks.examples import Example

#: The weights of --path as the first job found them; another processor would round them otherwise.
PATH = "path.json"
_OBJECTIVE = tuple(item.name for item in fields(Objective))


def path_of_jobs(
    out: Path, options: argparse.Namespace, model: PreTrainedModel, train: list[Example], template: Intervention,
    find: Callable[[], list[float]],
) -> list[float]:  # fmt: skip
    """The weights of --path; the jobs of a sweep take those of the one that began first.

    Args:
        out, options: the folder of the sweep, and the options of this job.
        model, train, template: the model, examples and intervention that the weights are found with.
        find: finds them.

    Raises:
        ValueError: the folder has those of jobs with other options, which are named; or the file was changed.
    """
    processes = current()
    if options.points is None:
        return processes.leaders(find())
    asked = {name: getattr(options, name) for name in ("path", "steps", "batch_size", "margin", "seeds")}
    asked |= {"weights": origin_of(model, collective=True).weights, "examples": examples_record(train)}
    asked |= {name: getattr(template.location, name) for name in ("site", "layers", "positions")}
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}  # as in JSON
    with locked(out / ".lock", f"the weights of --path in {out}", attempted=processes.from_leader):
        found = processes.from_leader(lambda: _read(out / PATH))
        if found is None:
            found = {"options": asked, "weights": processes.leaders(find())}
            processes.from_leader(lambda: write_sealed(out / PATH, found))
    if found["options"] != asked:
        former = found["options"]
        other = [f"{name} {former.get(name)}, now {asked[name]}" for name in asked if former.get(name) != asked[name]]
        raise ValueError(f"out: {out} belongs to jobs with another --path ({'; '.join(other)})")
    return [float(weight) for weight in found["weights"]]


def _read(path: Path) -> dict[str, Any] | None:
    """The weights that an earlier job found; None if there are none."""
    try:
        found: dict[str, Any] = read_sealed(path)
        return found
    except FileNotFoundError:
        return None


def keep_records(
    out: Path, options: argparse.Namespace, result: SweepResult, model: PreTrainedModel,
    train: list[Example], test: list[Example],
) -> None:  # fmt: skip
    """Write into the folder of each finished fit the record that `evaluate FOLDER` needs, where it is not there yet."""
    told = provenance(model, train, test)  # by all processes that hold the model
    for fit in result.fits if current().leads else ():
        folder = out / fit.folder
        if fit.error is not None or _has_record(folder):
            continue
        given: dict[str, Any] = {name: fit.settings[name] for name in _OBJECTIVE}
        objective = given | {"directions": list(given["directions"])}
        own = argparse.Namespace(**vars(options))
        for name in ("margin", "faithfulness", "minimality", "kl", "sparsity", "steps", "lr", "batch_size", "schedule"):
            setattr(own, name, fit.settings[name])
        own.seed = options.task_seed  # of the held-out examples
        own.kind, own.accumulate, own.n_active = "activ-scalar", 1, None
        own.include_answers = not fit.settings["exclude_answers"]
        own.one_direction = len(objective["directions"]) == 1
        save_record(folder, own, **told | {"objective": objective, "fit_seed": fit.settings["seed"]})


def _has_record(folder: Path) -> bool:
    with contextlib.suppress(ValueError):  # a damaged one is written again
        return bool((folder / FILE).is_file() and read_record(folder))
    return False
