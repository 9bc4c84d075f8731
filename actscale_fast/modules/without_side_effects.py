"""Running a model for a check, so that nothing in it shows afterwards that it ran."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .evaluation_mode import evaluation_mode
from .hooks import HOOKS, record_of

#: Held during such runs: the modes, hooks and compiler stance that they exchange are shared by all threads.
lock = threading.RLock()


@contextlib.contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen weights, nothing compiled and no hooks; modes and random states are restored."""
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    with lock, evaluation_mode(model):
        random, random_cuda = torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device)
        try:
            # Not under no_grad: in such a pass some quantised layers repack their weights for good.
            with unhooked(model, ours=False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            torch.set_rng_state(random)
            if device is not None and random_cuda is not None:
                torch.cuda.set_rng_state(random_cuda, device)


@contextlib.contextmanager
def unhooked(model: nn.Module, *, ours: bool = True) -> Iterator[None]:
    """Disable all hooks, except this package's own where `ours` is True.

    Hooks stay on where several processes run: sharding libraries gather weights in hooks.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield
        return
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            record = record_of(module) if ours else None
            kept = set() if record is None else {handle.id for handle in record.handles.values()}
            for name in HOOKS:
                there = module.__dict__.get(name)
                if there:
                    before.append((module, name, there))
                    module.__dict__[name] = OrderedDict((key, hook) for key, hook in there.items() if key in kept)
        yield
    finally:
        for module, name, there in before:
            new = {key: hook for key, hook in module.__dict__[name].items() if key not in there}
            there.update(new)  # transformers installs hooks during a model's first pass
            module.__dict__[name] = there
