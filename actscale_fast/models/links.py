"""Modules that must stay where they are while a patch is on: an exchanged one would run without its edit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class _Link:
    owner: weakref.ref[nn.Module]
    name: str  # of the child in its owner
    child: weakref.ref[nn.Module]
    path: str  # of the child in the model


class Links:
    """The steps from a model to some of its modules, as they are now; references are weak.

    Args:
        model: where the paths begin.
        paths: dotted paths of modules in it.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._links: dict[str, _Link] = {}
        for path in paths:
            owner, before = model, ""
            for name in path.split("."):
                child = owner._modules.get(name)
                if child is None:  # of a wrapper that hands on its inner module's attributes
                    break
                before = f"{before}.{name}" if before else name
                if before not in self._links:
                    self._links[before] = _Link(weakref.ref(owner), name, weakref.ref(child), before)
                owner = child

    def check(self) -> None:
        """Raise a RuntimeError that names a module which is no longer where it was."""
        for link in self._links.values():
            owner = link.owner()
            if owner is not None and owner._modules.get(link.name) is not link.child():
                now = owner._modules.get(link.name)
                raise RuntimeError(
                    f"patch: {link.path} was exchanged while an intervention was applied (it is a "
                    f"{type(now).__name__} now), so the intervention no longer acts there; remove the patch before the "
                    "module is changed and apply it again afterwards"
                )
