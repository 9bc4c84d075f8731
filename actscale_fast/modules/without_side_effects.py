"""Running a model in passing, so that nobody can tell afterwards that it ran."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .evaluation_mode import frozen
from .hooks import HOOKS, record_of

#: Held while models run in passing: what is exchanged for it (modes, hooks, the compiler's stance) serves all threads.
lock = threading.RLock()


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Frozen and in evaluation mode, nothing compiled, nobody's hooks; random numbers and modes are put back."""
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    with lock, frozen(model):
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
    """Nobody's hooks run inside, but this package's own where `ours` says so.

    Hooks stay where several processes run: those that bring a sharded weight together are hooks.
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
            there.update(new)  # such as transformers', which it installs in a model's first pass
            module.__dict__[name] = there
