"""What several commands load: the model, its tokenizer, and examples."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import tasks
from ..demo_model import load_demo_model, quiet_transformers, whole_model
from ..tasks.examples import Example, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: The prompts of the other tasks have one shape anyway.
_ALIGNABLE = ("country-capital", "greater-than", "indirect-object")


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `--model`, `--dtype`, `--device` and `--threads`, frozen and in eval mode, and its tokenizer.

    Raises:
        ValueError: a device that torch does not know or that is not there, or a model without a tokenizer.
        FileNotFoundError: neither a folder nor a model that can be fetched.
    """
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.model is None:
        model, tokenizer = load_demo_model()
        if options.dtype != "auto":
            torch.nn.Module.to(model, getattr(torch, options.dtype))
    else:
        model, tokenizer = _from_transformers(options.model, options.dtype)
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False), tokenizer


def load_file(name: str | None, option: str) -> list[Example]:
    """The examples of a file, before any model is loaded; none where the option was not given.

    Raises:
        FileNotFoundError, ValueError: no such file, or a bad line; names the option.
    """
    if name is None:
        return []
    if not Path(name).is_file():
        raise FileNotFoundError(f"{option}: there is no file {name}")
    return load_examples(name)


def load_files(options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """The examples of `--data` and of `--test-data`, before any model is loaded; refuses what only a task has.

    Raises:
        ValueError: held-out examples beside a task, which brings its own; or as `load_file` does.
    """
    check_task_options(options)
    if options.test_data is not None and options.task is not None:
        raise ValueError("test-data: a task brings held-out examples of its own; give --data instead of --task")
    return load_file(options.data, "data"), load_file(options.test_data, "test-data")


def check_task_options(options: argparse.Namespace) -> None:
    """Refuse options that the examples at hand do not have."""
    if options.aligned and options.task not in _ALIGNABLE:
        raise ValueError("aligned: it is of the tasks " + ", ".join(_ALIGNABLE))
    if options.split is not None and options.task != "country-capital":
        raise ValueError("split: it is of the task country-capital; the others are split by template")


def load_task(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of `--task`."""
    given: dict[str, Any] = {"n_train": options.n_train, "n_test": options.n_test, "seed": seed}
    makers: dict[str, Callable[..., tasks.TaskSplit]] = {
        "country-capital": tasks.country_capital_conflicts,
        "indirect-object": tasks.indirect_object_identification,
        "greater-than": tasks.greater_than,
        "name-order": tasks.name_order,
        "price-tagging": tasks.price_tagging,
    }
    if options.task in _ALIGNABLE:
        given["aligned"] = options.aligned
        if options.aligned and options.task == "country-capital":
            given["templates"] = tasks.ALIGNED_CONFLICT_TEMPLATES
    if options.split is not None:
        given["split"] = options.split
    train, test = makers[options.task](tokenizer, **given)
    return train, test


def output_folder(name: str) -> Path:
    """The folder, made now so that a place that cannot be written to is known before the work is done.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(name)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: {folder} cannot be written to")
    return folder


def check_folder(folder: Path, option: str = "out") -> None:
    """Refuse a folder that cannot be one, without making it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{option}: {there} cannot be written to")


def check_file(name: str | None, option: str) -> None:
    """Refuse the path of a file to write that is a folder or cannot be in one; None is no path."""
    if name is None:
        return
    if Path(name).is_dir():
        raise IsADirectoryError(f"{option}: {name} is a folder, expected the path of a file")
    check_folder(Path(name).absolute().parent, option)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: got {name!r}, which cannot be used here ({reason})") from error
    if device.type == "meta":
        raise ValueError("device: got 'meta', which holds no values")
    return device


def _from_transformers(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: there is no folder {name}")
    local = folder.is_dir()
    source = str(folder) if local else name
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    with quiet_transformers(bars=not local):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model = whole_model(source, dtype=chosen, local_files_only=local)
        except OSError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if local:
                raise FileNotFoundError(f"model: {source} holds no whole model and tokenizer ({reason})") from error
            raise FileNotFoundError(
                f"model: {name!r} is no folder, and could not be fetched from the Hugging Face hub ({reason})"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model: {name!r} cannot be loaded as a causal language model ({reason})") from error
    return model, tokenizer
