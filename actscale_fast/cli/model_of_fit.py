"""The model that a saved intervention is used with if --model is not given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .._log import logger
from ..architectures.model_origin import warn_of_other_weights
from ..demo_model import FOLDER_NAME
from ..interventions.description import DESCRIPTION
from .loading import load_model
from .options import QUANTIZERS
from .processes import current
from .record import FILE, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..interventions import Intervention


def load_model_of_fit(
    options: argparse.Namespace, folder: Path, intervention: Intervention
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model`; without --model, the one that the record of the fit names, otherwise the demo model.

    Which model is taken is said on stderr, unless it is the demo model and the intervention was made for that.

    Raises:
        ValueError: the record names no model as text, or a model that cannot be loaded.
        FileNotFoundError: the model that the record names is not there.
    """
    model, tokenizer = _loaded(options, folder, intervention)
    if current().size > 1:  # one process cannot read the weights of a sharded model, so that a patch would not warn
        for part in intervention.singles:
            warn_of_other_weights(model, part.location.origin, stacklevel=2, collective=True)
    return model, tokenizer


def _loaded(
    options: argparse.Namespace, folder: Path, intervention: Intervention
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.model is not None:
        return load_model(options)
    try:
        record = read_record(folder)
    except ValueError as error:
        logger.warning(str(error))
        record = {}
    options.model = record.get("model")
    if options.quantize is None and record.get("quantize") in QUANTIZERS:
        options.quantize = record["quantize"]
        logger.info(f"quantising the model as for the fit: {options.quantize} ({FILE}; --quantize none loads it plain)")
    if options.model is None:
        if "model" not in record:
            _tell_of_demo_model(folder, intervention)
        return load_model(options)
    path = folder / FILE
    if not isinstance(options.model, str):
        raise ValueError(f"{path}: got the model {options.model!r}, expected a string or null")
    logger.info(f"taking the model of the fit: {options.model} ({FILE}; --model names another)")
    try:
        return load_model(options)
    except (FileNotFoundError, ValueError) as error:
        if not str(error).startswith("model: "):
            raise
        raise type(error)(f"{path} names a model that cannot be loaded; pass --model ({error})") from error


def _tell_of_demo_model(folder: Path, intervention: Intervention) -> None:
    """Say that the demo model is taken, and which model the intervention was made for if that is another one."""
    names = dict.fromkeys(part.location.origin.name for part in intervention.singles if part.location.origin)
    others = [name for name in names if name is not None and Path(name).name != FOLDER_NAME]
    if others:
        logger.warning(
            f"{folder} has no record that names a model, so the demo model is taken; but {DESCRIPTION} says that "
            f"it was made for {', '.join(others)} (--model names another)"
        )
    elif not any(names):
        logger.info(f"{folder} does not say which model it was made for: taking the demo model (--model names another)")
