"""What the tests of frozen models share: the state that a run must leave alone, and reading by plain hooks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from actscale_fast.architectures.layout import layout


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that could tell that somebody was here: classes, attributes, hooks, modes, parameters and their gradients."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_forward")}
        hooks = {key: list(value) for key, value in module.__dict__.items() if key.startswith("_forward")}
        found[name] = type(module), attributes, hooks, module.training
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = parameter.requires_grad, parameter.grad, parameter._version, parameter.data_ptr()
    return found


def read_by_hand(model: Any, site: str, ids: Tensor) -> Tensor:
    """[L, B, T, H, D] by hooks on a plain forward pass."""
    found, values = layout(model), []
    heads = found.n_heads if site == "head" else 1

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        values.append(args[0])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        values.append((output[0] if isinstance(output, tuple) else output).clone())  # Falcon adds to it in place

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in range(found.n_layers):
            module = found.site_module(site, layer)
            hook = module.register_forward_pre_hook(before) if site == "head" else module.register_forward_hook(after)
            stack.callback(hook.remove)
        model(ids)
    return torch.stack([value.reshape(*ids.shape, heads, -1) for value in values])
