"""A saved intervention with its model and the examples to measure it on: those of its fit unless others are named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .loading import examples_for, load_files
from .model_of_fit import load_model_of_fit
from .own_split import OwnSplit, fill_defaults
from .provenance import load_saved
from .record import keeps_space, task_seed, was_fitted_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..interventions import Intervention
    from ..tasks.examples import Example


class SavedWithExamples(NamedTuple):
    """What `evaluate` and `stress` work on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    intervention: Intervention
    title: str  # what the examples are, for a table


def saved_with_examples(options: argparse.Namespace) -> SavedWithExamples:
    """Load what the options name; see `options.saved` and `options.data`.

    Raises:
        ValueError, FileNotFoundError: as `OwnSplit`, `load_files` and `load_model`.
    """
    folder = Path(options.folder or options.intervention)
    intervention = load_saved(folder)
    own = OwnSplit(options, folder) if options.data is None and options.task is None else None
    fill_defaults(options)
    files = load_files(options)
    seed = task_seed(folder, options.task, options.seed, warns=own is None)
    for name in ("aligned", "chat"):
        setattr(options, name, getattr(options, name) or was_fitted_with(name, folder, options.task))
    options.answers_stripped = not keeps_space(folder, options.task)
    model, tokenizer = load_model_of_fit(options, folder, intervention)
    in_file, held_out = examples_for(options, tokenizer, seed, files)
    if options.task is None:
        examples, title = in_file, str(options.data)
    else:
        examples, title = held_out, f"Held-out examples of the task, seed {seed}"
    if own is not None:
        title = own.title(examples, tokenizer)
    return SavedWithExamples(model, tokenizer, examples, intervention, title)
