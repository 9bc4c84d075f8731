"""What several commands load: the model, its tokenizer and examples; checks of output paths."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import tasks
from .._files import check_writable
from ..demo_model import load_demo_model, quiet_transformers, whole_model
from ..frozen.chat import has_chat_template, user_message
from ..interventions.description import DESCRIPTION
from ..learning.broken_connections import is_broken_connection
from ..learning.prompt_spaces import without_needless_space
from ..tasks.examples import Example
from ..tasks.loading import load_examples
from .processes import current
from .quantize import quantization_config
from .verbosity import shows_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Tasks with --aligned; the prompts of the others are always aligned.
_ALIGNABLE = ("country-capital", "greater-than", "indirect-object")


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the options name, the model frozen and in evaluation mode.

    Raises:
        ValueError: a device that cannot be used, or a model that cannot be loaded.
        FileNotFoundError: neither a folder nor a model that can be downloaded.
    """
    if options.device_map is not None:
        if options.device != "auto":
            raise ValueError("--device-map divides the model between devices and cannot be used with --device")
        if current().size > 1:
            raise ValueError(
                "--device-map divides a model between the devices of one process, but several were started"
            )
    sharded = _sharded(options)
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    more: dict[str, Any] = {} if options.attn is None else {"attn_implementation": options.attn}
    if options.quantize not in (None, "none"):
        more["quantization_config"] = quantization_config(options.quantize)
        more["device_map"] = {"": str(device)}
    if options.device_map is not None:
        more["device_map"] = options.device_map
    more |= sharded
    name = options.model
    if name is None:
        model, tokenizer = load_demo_model()
        name = model.config._name_or_path if more else None
        if options.dtype != "auto":
            torch.nn.Module.to(model, getattr(torch, options.dtype))
    if name is not None:
        model, tokenizer = _from_transformers(name, options.dtype, bars=shows_progress(options), **more)
    if "device_map" not in more and not sharded:
        torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False), tokenizer


def load_files(options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """The examples in `--data` and `--test-data`; options that do not go with the source of examples are refused."""
    check_task_options(options)
    held_out = getattr(options, "test_data", None)
    if held_out is not None and options.task is not None:
        raise ValueError("--test-data cannot be used with --task, which has its own held-out examples")
    options.columns = {field: name for given in options.columns or [] for field, name in given.items()}
    return _in_file(options.data, "data", options.columns), _in_file(held_out, "test-data", options.columns)


def _in_file(name: str | None, option: str, columns: dict[str, str]) -> list[Example]:
    """The examples in a file, or none if the option was not given."""
    if name is None:
        return []
    if not Path(name).is_file():
        raise FileNotFoundError(f"{option}: there is no file {name}")
    return load_examples(name, columns)


def check_task_options(options: argparse.Namespace) -> None:
    """Raise a ValueError for options that the task does not have."""
    if options.columns and options.task is not None:
        raise ValueError("--columns cannot be used with --task, which has no columns")
    if options.aligned and options.task not in _ALIGNABLE:
        raise ValueError("--aligned is only available for the tasks " + ", ".join(_ALIGNABLE))
    if options.split is not None and options.task != "country-capital":
        raise ValueError("--split is only available for the task country-capital; the others are split by template")


def examples_for(
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    files: tuple[list[Example], list[Example]],
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: those of `--task`, otherwise those of the files; with `--chat` as messages."""
    train, test = files if options.task is None else load_task(options, tokenizer, seed)
    if not options.chat:
        return train, test
    # What is not set by the record of an earlier fit is decided here, and recorded.
    options.answers_stripped = options.task is not None and getattr(options, "answers_stripped", True)
    check_chat_template(tokenizer)
    in_chat = [[_as_message(example) for example in some] for some in (train, test)]
    if options.answers_stripped:
        in_chat = [[without_needless_space(example, tokenizer) for example in some] for some in in_chat]
    return in_chat[0], in_chat[1]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer cannot write messages as text."""
    if not has_chat_template(tokenizer):
        raise ValueError("--chat: this model's tokenizer has no chat template")


def _as_message(example: Example) -> Example:
    """The example with its prompt, and its source, as a message of the user; messages stay as they are."""
    source = user_message(example.source) if isinstance(example.source, str) else example.source
    if example.messages is not None:
        return replace(example, source=source)
    return replace(example, prompt="", messages=user_message(example.prompt), source=source)


def load_task(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of `--task`."""
    given: dict[str, Any] = {"n_train": options.n_train, "n_test": options.n_test, "seed": seed}
    makers: dict[str, Callable[..., tasks.TaskSplit]] = {
        "country-capital": tasks.country_capital_conflicts,
        "indirect-object": tasks.indirect_object_identification,
        "greater-than": tasks.greater_than,
        "knowledge-conflict": tasks.knowledge_conflicts,
        "name-order": tasks.name_order,
        "price-tagging": tasks.price_tagging,
    }
    if options.task in _ALIGNABLE:
        given["aligned"] = options.aligned
        if options.aligned and options.task == "country-capital":
            given["templates"] = tasks.ALIGNED_CONFLICT_TEMPLATES
    if getattr(options, "n_templates", None) is not None:
        given["templates"] = tasks.CONFLICT_TEMPLATES[: options.n_templates]
    if options.split is not None:
        given["split"] = options.split
    train, test = makers[options.task](tokenizer, **given)
    return train, test


def output_folder(name: str) -> Path:
    """The output folder, created before any work is done; an OSError if it cannot be written to."""
    folder = Path(name)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: {folder} cannot be written to")
    check_writable(folder / DESCRIPTION)  # a full disk is found out now, not when the result is there
    return folder


def check_folder(folder: Path, option: str = "out") -> None:
    """Raise an OSError if a folder cannot be created or written to, without creating it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{option}: {there} cannot be written to")


def check_file(name: str | None, option: str) -> None:
    """Raise an OSError if a file cannot be written at this path."""
    if name is None:
        return
    if Path(name).is_dir():
        raise IsADirectoryError(f"{option}: {name} is a folder, expected the path of a file")
    check_folder(Path(name).absolute().parent, option)


def _sharded(options: argparse.Namespace) -> dict[str, Any]:
    """What `from_pretrained` needs for --tp and --fsdp."""
    sizes = {name: getattr(options, name, 1) for name in ("tp", "fsdp")}
    given = " and ".join(f"--{name}" for name, number in sizes.items() if number > 1)
    if not given:
        return {}
    if options.device != "auto":
        raise ValueError(f"{given} chooses the device of each process itself, and cannot be used with --device")
    if options.quantize not in (None, "none"):
        raise ValueError(
            f"{given} cannot be used with a quantised model, which is loaded as {options.quantize}; --quantize none "
            "loads its weights as they are saved"
        )
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        raise ValueError(f"{given} needs a newer transformers, whose weights say how they are sharded")
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=sizes["tp"], fsdp_size=sizes["fsdp"])}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if current().size > 1 and name.startswith("cuda"):
        return _own_gpu(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: got {name!r}, which cannot be used here ({reason})") from error
    if device.type == "meta":
        raise ValueError("device: got 'meta', which holds no values")
    return device


def _own_gpu(name: str) -> torch.device:
    """The GPU of this process, one of several on this machine."""
    if name != "cuda":
        raise ValueError(f"device: got {name!r} for several processes, each of which needs a GPU of its own; use cuda")
    there, local = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    place = int(local) if local.isdecimal() else current().rank % there
    place = 0 if there == 1 else place  # schedulers may show each process a GPU of its own alone
    seen = (
        f"this process sees {there}; LOCAL_RANK={local}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}"
    )
    if place >= there:
        raise ValueError(f"device: there is no GPU number {place} for process {current().rank} ({seen})")
    torch.cuda.set_device(place)
    taken = current().all_gather((socket.gethostname(), str(torch.cuda.get_device_properties(place).uuid)))
    shared = [rank for rank, one in enumerate(taken) if one == taken[current().rank]]
    if len(shared) > 1:
        raise ValueError(f"device: processes {', '.join(map(str, shared))} would share one GPU ({seen})")
    return torch.device("cuda", place)


class _CannotShareError(ValueError):
    """A model that the processes cannot hold together."""


def _check_shared(source: str, processes: int, **more: Any) -> None:
    """Raise an error for a quantised model, or if tensor parallelism cannot divide a model's heads."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(source, **more)
    if getattr(whole, "quantization_config", None) is not None:
        raise _CannotShareError(f"{source} is quantised, and cannot be shared by --tp or --fsdp")
    config = whole.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, field, None)
        if isinstance(number, int) and number % processes:
            raise _CannotShareError(
                f"--tp {processes} does not divide {field}={number} of {source}; use --fsdp, which divides weights"
            )


def _from_transformers(
    name: str, dtype: str, *, bars: bool, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: there is no folder {name}")
    local = folder.is_dir()
    source = str(folder) if local else name
    chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
    with quiet_transformers(bars=bars and not local):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            if "distributed_config" in more:
                _check_shared(source, more["distributed_config"].tp_size, local_files_only=local)
            model = whole_model(source, dtype=chosen, local_files_only=local, **more)
        except OSError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problem = (
                f"{source} does not hold a complete model with a tokenizer"
                if local
                else f"{name!r} is not a folder, and could not be downloaded from the Hugging Face hub"
            )
            raise FileNotFoundError(f"model: {problem} ({reason})") from error
        except Exception as error:
            if isinstance(error, _CannotShareError) or is_broken_connection(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model: {name!r} cannot be loaded as a causal language model ({reason})") from error
    return model, tokenizer
