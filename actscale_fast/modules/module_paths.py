"""The paths to modules that must stay in place while a patch is on: an exchanged module would run without its edit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class _Step:
    owner: weakref.ref[nn.Module]
    name: str  # of the child in its owner
    child: weakref.ref[nn.Module]
    forward: int | None  # `own_forward` of the child
    path: str  # of the child in the model


class ModulePaths:
    """The steps from a model to some of its modules, as they are now; the references are weak.

    Args:
        model: where the paths begin.
        edited: dotted paths of the modules that are edited.
        others: dotted paths of modules that must not be exchanged for edited ones.
    """

    def __init__(self, model: nn.Module, edited: Iterable[str] = (), others: Iterable[str] = ()) -> None:
        self._steps: dict[str, _Step] = {}
        self._others: dict[str, _Step] = {}
        self._edited: list[weakref.ref[nn.Module]] = []
        self._lists: list[tuple[weakref.ref[nn.Module], int]] = []  # their lengths decide how often modules run
        for path in edited:
            self._follow(model, path, self._steps)
            self._edited.append(self._steps[path].child if path in self._steps else weakref.ref(model))
        for path in others:
            self._follow(model, path, self._others)

    def check(self) -> None:
        """Raise a RuntimeError that names a module which is no longer where it was."""
        for step in self._steps.values():
            owner, child = step.owner(), step.child()
            if owner is None:
                continue
            now = owner._modules.get(step.name)
            if now is None or now is not child:
                what = "removed" if now is None else "exchanged"
                kind = "" if now is None else f" (it is a {type(now).__name__} now)"
                raise RuntimeError(f"patch: {step.path} was {what} while an intervention was applied{kind}; {_HELP}")
            if own_forward(now) != step.forward:
                raise RuntimeError(f"patch: the forward of {step.path} ({type(now).__name__}) was exchanged; {_HELP}")
        for reference, length in self._lists:
            modules = reference()
            if modules is not None and len(modules._modules) != length:
                raise RuntimeError(
                    f"patch: the list of layers has {len(modules._modules)} items, not {length}; {_HELP}"
                )
        if self._others:
            edited = [reference() for reference in self._edited]
            for step in self._others.values():
                owner = step.owner()
                now = None if owner is None else owner._modules.get(step.name)
                if now is not None and now is not step.child() and any(now is one for one in edited):
                    raise RuntimeError(
                        f"patch: {step.path} was exchanged while an intervention was applied, for a module that is "
                        f"edited; {_HELP}"
                    )

    def _follow(self, model: nn.Module, path: str, steps: dict[str, _Step]) -> None:
        owner, before = model, ""
        for name in path.split("."):
            child = owner._modules.get(name)
            if child is None:  # a wrapper passes on the attributes of the module inside it
                return
            before = f"{before}.{name}" if before else name
            if before not in self._steps and before not in steps:
                steps[before] = _Step(weakref.ref(owner), name, weakref.ref(child), own_forward(child), before)
                if isinstance(child, nn.ModuleList):
                    self._lists.append((weakref.ref(child), len(child)))
            owner = child


_HELP = "remove the patch before modules are changed, and apply it again afterwards"


def own_forward(module: nn.Module) -> int | None:
    """The id of a forward set on the instance; None where there is none, or where it calls the class's forward.

    This package's own wrappers tell what stood on the instance before them, `wrapped_forward`, and count as that.
    """
    forward: Any = module.__dict__.get("forward")
    while hasattr(forward, "wrapped_forward"):
        forward = forward.wrapped_forward
    return None if forward is None or "_hf_hook" in module.__dict__ else id(forward)
