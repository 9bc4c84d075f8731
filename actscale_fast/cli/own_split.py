"""The examples that a fit held out, found again from its record: what `evaluate FOLDER` measures by default."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DTYPES, N_TEST, N_TRAIN
from .provenance import examples_record
from .record import FILE, read_record

if TYPE_CHECKING:
    from ..tasks.examples import Example

#: The options that choose examples; those that were not given are taken from the record.
_CHOOSING = ("columns", "chat", "aligned", "split", "n_train", "n_test", "seed")
_ELSE = "name the examples with --data or --task"


class OwnSplit:
    """Sets the options of `evaluate` to those that give the examples that a fit held out.

    Args:
        options: with neither --data nor --task.
        folder: where the fit saved its intervention and its record.

    Raises:
        ValueError: the record is missing, damaged or of an earlier version, or the fit held nothing out.
        FileNotFoundError: the file of held-out examples is not there.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        record = read_record(folder)
        if not record:
            raise ValueError(f"{folder} has no record of a fit ({FILE}), which says what was held out; {_ELSE}")
        known = record.get("examples") or {}
        if "test" not in known:
            raise ValueError(f"{folder / FILE}, of an earlier version, has no digest of what was held out; {_ELSE}")
        self.folder, self.expected = folder, known["test"]
        if not self.expected["n"]:
            raise ValueError(f"{folder} was fitted without held-out examples (--test-data); {_ELSE}")
        self.is_changed = any(
            _is_given(options, name) and getattr(options, name) != record.get(name) for name in _CHOOSING
        )
        options.task, options.data = record["task"], record.get("test_data")
        options.n_templates = record.get("n_templates")  # of the demo
        for name in _CHOOSING:
            if not _is_given(options, name):
                setattr(options, name, record.get(name))
        if isinstance(options.columns, dict):
            options.columns = [options.columns] if options.columns else None
        if options.task is not None:
            self.source = f"{options.task}, seed {options.seed}"
        else:
            self.source = str(options.data)
            if not Path(self.source).is_file():
                raise FileNotFoundError(
                    f"{folder} was evaluated on {self.source}, which is not there; run it where the fit ran, or {_ELSE}"
                )
        if options.dtype == "auto" and record.get("dtype") in DTYPES:
            options.dtype = record["dtype"]

    def check(self, examples: Sequence[Example]) -> None:
        """Raise a ValueError unless these are the examples that the fit held out, or options ask for others."""
        found = examples_record(examples)
        if found != self.expected and not self.is_changed:
            told, expected = (f"{some['n']} with SHA-256 {some['sha256'][:16]}" for some in (found, self.expected))
            raise ValueError(
                f"{self.folder}: {self.source} no longer gives the examples that the fit held out (got {told}, "
                f"expected {expected}): the file, the tokenizer or the package has changed; {_ELSE}"
            )

    @property
    def title(self) -> str:
        """What the examples are, for a table."""
        changed = ", changed by the options given" if self.is_changed else ""
        return f"Held-out examples of the fit, {self.source}{changed}"


def _is_given(options: argparse.Namespace, name: str) -> bool:
    value = getattr(options, name)
    return value is not None and value is not False


def take_model_of_fit(options: argparse.Namespace, folder: Path) -> None:
    """Without --model, take the one that the record names."""
    if options.model is None:
        with contextlib.suppress(ValueError):  # who needs the record says that it is damaged
            options.model = read_record(folder).get("model")


def fill_defaults(options: argparse.Namespace) -> None:
    """The numbers of examples that neither the command line nor a record gives."""
    options.n_train, options.n_test = options.n_train or N_TRAIN, options.n_test or N_TEST
