"""The examples that a fit held out, found again from its record: what `evaluate FOLDER` measures by default."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._log import logger
from ..tasks.examples import example_fields
from .loading import examples_for
from .options import DTYPES, N_TEST, N_TRAIN
from .provenance import examples_record
from .record import FILE, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tasks.examples import Example

#: The options that choose examples; those that were not given are taken from the record.
_CHOOSING = ("columns", "chat", "aligned", "split", "n_train", "n_test", "seed")
#: Those that make a difference to the examples in a file.
_OF_FILE = ("columns", "chat")
_ELSE = "pass --data or --task"


class OwnSplit:
    """Sets the options of `evaluate` to those that give the examples that a fit held out.

    Args:
        options: with neither --data nor --task.
        folder: where the fit saved its intervention and its record.

    Raises:
        ValueError: the record is missing, damaged or of an earlier version, the fit held nothing out, or an option that
            does nothing with the fit's file of held-out examples.
        FileNotFoundError: the file of held-out examples is not there.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        record = read_record(folder)
        if not record:
            raise ValueError(f"{folder} has no record of a fit ({FILE}), which says what was held out; {_ELSE}")
        known = record.get("examples") or {}
        if "test" not in known:
            raise ValueError(
                f"{folder / FILE} was written by an earlier version and does not identify the held-out examples; "
                f"{_ELSE}"
            )
        self.folder, self.expected = folder, known["test"]
        if not self.expected["n"]:
            raise ValueError(f"{folder} was fitted without held-out examples (--test-data); {_ELSE}")
        self.is_task = record["task"] is not None
        given = [name for name in _CHOOSING if _is_given(options, name)]
        self.changed = [name for name in given if _given(options, name) != record.get(name)]
        self.missing = [name for name in _needed(record) if name not in record and name not in given]
        options.task, options.data = record["task"], record.get("test_data")
        options.n_templates = record.get("n_templates")  # of the demo
        self.recorded = argparse.Namespace(**vars(options) | {name: record.get(name) for name in _CHOOSING})
        self.recorded.answers_stripped = bool(record.get("answers_stripped"))
        for name in _CHOOSING:
            if name not in given:
                setattr(options, name, record.get(name))
        if isinstance(options.columns, dict):
            options.columns = [options.columns] if options.columns else None
        if self.is_task:
            self.source = f"{options.task}, seed {options.seed}"
        else:
            self.source = str(options.data)
            self._check_file([name for name in given if name not in _OF_FILE])
        if options.dtype == "auto" and record.get("dtype") in DTYPES:
            options.dtype = record["dtype"]

    def _check_file(self, useless: list[str]) -> None:
        if useless:
            raise ValueError(
                f"{_words(useless)} cannot be used here: {self.folder} was evaluated on the file {self.source}, of "
                "which all examples are used"
            )
        if not Path(self.source).is_file():
            raise FileNotFoundError(
                f"{self.folder} was evaluated on {self.source}, which is not there; run it where the fit ran, or "
                f"{_ELSE}"
            )

    def title(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
        """What these examples are, for a table; a warning if options ask for others than the fit held out.

        Raises:
            ValueError: they are not the examples that the fit held out, although no option asks for others.
        """
        found = examples_record(examples)
        if found == self.expected:
            return f"Held-out examples of the fit, {self.source}"
        if not self.changed:
            told, expected = (f"{some['n']} with SHA-256 {some['sha256'][:16]}" for some in (found, self.expected))
            raise ValueError(
                f"{self.folder}: {self.source} no longer gives the examples that the fit held out (got {told}, "
                f"expected {expected}): {self._reason()}; {_ELSE}"
            )
        if self._are_some(examples, tokenizer):
            return f"Held-out examples of the fit, {self.source}, {found['n']} of {self.expected['n']}"
        logger.warning(
            f"with {_words(self.changed)} these are not the examples that {self.folder} held out: some of them may "
            "have been used in training"
        )
        return f"Examples of the {'task' if self.is_task else 'file'}, not those that the fit held out: {self.source}"

    def _reason(self) -> str:
        if self.missing:
            return f"{FILE} was written by an earlier version and lacks {', '.join(self.missing)}"
        return "the file, the tokenizer or the package has changed"

    def _are_some(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether all of these are among the examples that the fit held out, such as with a smaller --n-test."""
        if self.changed != ["n_test"]:
            return False
        fill_defaults(self.recorded)
        _, held_out = examples_for(self.recorded, tokenizer, self.recorded.seed, ([], []))
        return examples_record(held_out) == self.expected and _texts(examples) <= _texts(held_out)


def _needed(record: dict[str, Any]) -> list[str]:
    """The keys of a record that say which examples were held out."""
    if record["task"] is None:
        return ["columns", "chat"]
    needed = [name for name in _CHOOSING if name != "columns"]
    return needed + ["answers_stripped"] * bool(record.get("chat"))


def _is_given(options: argparse.Namespace, name: str) -> bool:
    value = getattr(options, name)
    return value is not None and value is not False


def _given(options: argparse.Namespace, name: str) -> Any:
    """The value of an option as a record has it."""
    value = getattr(options, name)
    return {field: column for part in value for field, column in part.items()} if name == "columns" else value


def _words(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _texts(examples: Sequence[Example]) -> set[str]:
    return {json.dumps(example_fields(example)) for example in examples}


def fill_defaults(options: argparse.Namespace) -> None:
    """The numbers of examples that neither the command line nor a record gives."""
    options.n_train, options.n_test = options.n_train or N_TRAIN, options.n_test or N_TEST
