"""The options that an intervention was learned with, saved beside it so that `evaluate` finds its held-out examples."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import defaults
from .._json import parsed_sealed, read_limited, write_json, write_sealed
from .._log import logger
from ..interventions.description import DESCRIPTION
from .output import print_evaluation

if TYPE_CHECKING:
    from ..interventions import Intervention
    from ..learning import Evaluation

FILE, EVALUATION = "fit.json", "evaluation.json"
_KEPT = (
    "model", "quantize", "attn", "data", "test_data", "columns", "chat", "answers_stripped", "task", "aligned", "split",
    "n_train", "n_test", "seed",
    "steps", "lr", "batch_size",
    "schedule", "accumulate", "kind", "margin", "faithfulness", "minimality", "n_active", "kl",
    "include_answers",
    "one_direction", "sparsity", "epochs", "rotation_lr", "boundary_lr", "boundary_weight",
)  # fmt: skip


class Learned(Protocol):
    """A result of learning: the intervention and one record for each step."""

    @property
    def intervention(self) -> Intervention: ...
    @property
    def history(self) -> list[dict[str, float]]: ...


def save_record(folder: Path, options: argparse.Namespace, **more: Any) -> None:
    """Write the options that determine what is learned, and those in `more`."""
    record = {name: getattr(options, name) for name in _KEPT if hasattr(options, name)} | more
    write_sealed(folder / FILE, {"format": 2, "intervention": _intervention_in(folder)} | record)


def keep_learned(folder: Path, options: argparse.Namespace, result: Learned, **more: Any) -> None:
    """Write a learned intervention, its history and its record (with what is in `more`), replacing earlier ones."""
    (folder / EVALUATION).unlink(missing_ok=True)  # of an earlier intervention in this folder
    result.intervention.save_pretrained(folder)
    write_sealed(folder / "history.json", result.history)
    save_record(folder, options, **more)


def keep_selected(folder: Path, options: argparse.Namespace, intervention: Intervention, **more: Any) -> None:
    """Write an intervention that was chosen without a history, and its record, replacing earlier ones."""
    for name in (EVALUATION, "history.json"):  # of an earlier intervention in this folder
        (folder / name).unlink(missing_ok=True)
    intervention.save_pretrained(folder)
    save_record(folder, options, **more)


def measure_learned(folder: Path, evaluation: Evaluation, title: str) -> None:
    """Print an evaluation and write it beside the intervention."""
    print_evaluation(title, evaluation)
    write_json(folder / EVALUATION, evaluation.to_dict())


def task_seed(folder: Path, task: str | None, given: int | None, *, warns: bool = True) -> int:
    """The seed of a task's held-out examples: the given one, otherwise that of the fit, otherwise the default.

    A seed other than the fit's prints a warning if `warns`, because the fit may have learned from some of its held-out
    examples.

    Raises:
        ValueError: the record is damaged.
    """
    taught = None if task is None else _seed_of(folder / FILE, task)
    if given is None:
        return defaults.SEED if taught is None else taught
    if warns and taught is not None and given != taught:
        logger.warning(
            f"{folder} was fitted with --seed {taught}; with --seed {given} some of these "
            "examples were used in training"
        )
    return given


def was_fitted_with(option: str, folder: Path, task: str | None) -> bool:
    """Whether the recorded fit on this task had an option such as "aligned".

    Raises:
        ValueError: the record is damaged.
    """
    return task is not None and bool(_of_task(folder / FILE, task).get(option))


def keeps_space(folder: Path, task: str | None) -> bool:
    """Whether the recorded fit on this task learned answers with their space in a chat, as earlier versions did.

    Raises:
        ValueError: the record is damaged.
    """
    return was_fitted_with("chat", folder, task) and not was_fitted_with("answers_stripped", folder, task)


def _of_task(path: Path, task: str) -> dict[str, Any]:
    """The record of a fit on this task; empty if there is none."""
    record = read_record(path.parent)
    return record if record.get("task") == task else {}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the fit whose intervention a folder holds; empty if there is none.

    Raises:
        ValueError: the record is damaged, or belongs to another intervention.
    """
    path = folder / FILE
    try:
        raw = read_limited(path)
    except FileNotFoundError:
        return {}
    try:
        record, is_sealed = parsed_sealed(raw, finite=False)
        if is_sealed != ("format" in record):  # records of earlier versions have neither
            raise ValueError("it has no checksum")
        if "format" in record and record["intervention"] != _intervention_in(path.parent):
            raise ValueError("it belongs to another intervention")
        if not isinstance(record, dict) or "task" not in record:
            raise ValueError("it names no task")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not the record of a fit ({error})") from None


def _intervention_in(folder: Path) -> str | None:
    """The checksum of the folder's description, which contains that of the tensors."""
    try:
        return hashlib.sha256(read_limited(folder / DESCRIPTION)).hexdigest()
    except FileNotFoundError:
        return None


def _seed_of(path: Path, task: str) -> int | None:
    """The seed of the recorded fit on this task; None if there is none."""
    record = _of_task(path, task)
    if record and type(record.get("seed")) is not int:
        raise ValueError(f"{path}: damaged, or not the record of a fit (seed {record.get('seed')!r})")
    return record["seed"] if record else None
