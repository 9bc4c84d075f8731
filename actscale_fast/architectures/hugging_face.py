"""A Hugging Face model from outside: the model inside its wrappers, its text config, its embedding and its devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside the wrappers of torch.compile and PEFT."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a Hugging Face causal language model")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None or inner is model:
            return model
        model = inner


def text_config(model: nn.Module) -> Any:
    """The config of a model's text decoder; in models like BART, the decoder's half of it."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def embedding_weight(model: nn.Module) -> torch.Tensor:
    """The weight [V, d] of a model's token embedding.

    Raises:
        ValueError: the model takes no ids of text tokens.
    """
    embedding: Any = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(
            f"model: {type(model).__name__} has a {type(embedding).__name__} in the place of a token embedding, "
            "expected a model of text"
        )
    return weight


def input_device(model: nn.Module) -> torch.device:
    """Where token ids belong: where the embedding computes."""
    return execution_device(unwrap(model).get_input_embeddings()) or torch.device("cpu")  # type: ignore[operator]


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: the device that accelerate names where it offloads weights, else the weights' device."""
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device
