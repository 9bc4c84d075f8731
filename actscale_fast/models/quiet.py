"""Running a model in passing, so that nobody can tell afterwards that it ran."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, nothing compiled, nobody's hooks; random numbers and modes are put back.

    Hooks stay where several processes run: those that bring a sharded weight together are hooks.
    """
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    training = [module for module in model.modules() if module.training]
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    hooks = (
        [(module, name, module.__dict__.get(name)) for module in model.modules() for name in _HOOKS] if alone else []
    )
    random, random_cuda = torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device)
    try:
        for module in training:
            module.training = False
        for module, name, there in hooks:
            if there:
                module.__dict__[name] = OrderedDict()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, name, there in hooks:
            if there is not None:
                module.__dict__[name] = there
        for module in training:
            module.training = True
        torch.set_rng_state(random)
        if device is not None and random_cuda is not None:
            torch.cuda.set_rng_state(random_cuda, device)
