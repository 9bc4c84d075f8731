"""Modules that must stay where they are while a patch is on: an exchanged one would run without its edit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class _Link:
    owner: weakref.ref[nn.Module]
    name: str  # of the child in its owner
    child: weakref.ref[nn.Module]
    forward: int | None  # the identity of a forward of the child's own, beside its class's
    path: str  # of the child in the model


class Links:
    """The steps from a model to the modules of a site, as they are now; references are weak.

    Args:
        model: where the paths begin.
        steered: dotted paths of the modules that are edited.
        others: those of the modules that stand at the site elsewhere, which must not become edited ones.
    """

    def __init__(self, model: nn.Module, steered: Iterable[str] = (), others: Iterable[str] = ()) -> None:
        self._links: dict[str, _Link] = {}
        self._others: dict[str, _Link] = {}
        self._edited: list[weakref.ref[nn.Module]] = []
        self._lists: list[tuple[weakref.ref[nn.Module], int]] = []  # whose length decides how often modules run
        for path in steered:
            self._follow(model, path, self._links)
            self._edited.append(self._links[path].child if path in self._links else weakref.ref(model))
        for path in others:
            self._follow(model, path, self._others)

    def check(self) -> None:
        """Raise a RuntimeError that names a module which is no longer where it was."""
        for link in self._links.values():
            owner, child = link.owner(), link.child()
            if owner is None:
                continue
            now = owner._modules.get(link.name)
            if now is None or now is not child:
                what = "removed" if now is None else "exchanged"
                kind = "" if now is None else f" (it is a {type(now).__name__} now)"
                raise RuntimeError(f"patch: {link.path} was {what} while an intervention was applied{kind}; {_HELP}")
            if own_forward(now) != link.forward:
                raise RuntimeError(f"patch: the forward of {link.path} ({type(now).__name__}) was exchanged; {_HELP}")
        for reference, length in self._lists:
            modules = reference()
            if modules is not None and len(modules._modules) != length:
                raise RuntimeError(
                    f"patch: the list of layers has {len(modules._modules)} items, not {length}; {_HELP}"
                )
        if self._others:
            edited = [reference() for reference in self._edited]
            for link in self._others.values():
                owner = link.owner()
                now = None if owner is None else owner._modules.get(link.name)
                if now is not None and now is not link.child() and any(now is one for one in edited):
                    raise RuntimeError(
                        f"patch: {link.path} was exchanged while an intervention was applied, for a module that is "
                        f"edited; {_HELP}"
                    )

    def _follow(self, model: nn.Module, path: str, links: dict[str, _Link]) -> None:
        owner, before = model, ""
        for name in path.split("."):
            child = owner._modules.get(name)
            if child is None:  # of a wrapper that hands on its inner module's attributes
                return
            before = f"{before}.{name}" if before else name
            if before not in self._links and before not in links:
                links[before] = _Link(weakref.ref(owner), name, weakref.ref(child), own_forward(child), before)
                if isinstance(child, nn.ModuleList):
                    self._lists.append((weakref.ref(child), len(child)))
            owner = child


_HELP = "remove the patch before modules are changed, and apply it again afterwards"


def own_forward(module: nn.Module) -> int | None:
    """The identity of a forward that was put on the instance; None: there is none, or it leads back to the class's."""
    forward: Any = module.__dict__.get("forward")
    passes_on = "_hf_hook" in module.__dict__ or getattr(forward, "passes_on", False)
    return None if forward is None or passes_on else id(forward)
