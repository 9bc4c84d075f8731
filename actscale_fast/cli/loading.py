"""What several commands load: the model, its tokenizer, and examples."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..demo_model import load_demo_model, quiet_transformers
from ..learning import Example, load_examples, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def load_data(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of `--data` (all of them training) or `--task`."""
    if options.data is not None:
        return load_examples(options.data), []
    sizes = {"n_train": options.n_train, "n_test": options.n_test, "seed": options.seed}
    if options.task == "country-capital":
        train, test = tasks.country_capital_conflicts(tokenizer, **sizes)
    else:
        train, test = tasks.indirect_object_identification(tokenizer, **sizes)
    return train, test


def output_folder(name: str) -> Path:
    """The folder, made now so that a place that cannot be written to is known before the work is done.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: {folder} cannot be written to")
    return folder


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: there is no folder {name}")
    local = folder.is_dir()
    source = str(folder) if local else name
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    with quiet_transformers(bars=not local):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=chosen, local_files_only=local)
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
