"""The site check: short forward passes that show whether the sites of a model are what their names say.

There is one pass per site and model. Head site: heads are scaled one by one, and must enter the output projection with
these factors; this finds a norm over all heads, the difference of two heads, or a change of their order, whatever the
family is called. Other sites: outputs are doubled and negated, and the rows must then differ after the layer; where
doubling changes nothing, because a norm without scale follows, scalars cannot act. Every edited module must run once.

The verdict is kept for the model. `ACTSCALE_CHECK=0` skips the check.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modules.hooks import plain_class
from ..modules.module_paths import own_forward
from .layout import ModelLayout
from .parts import has
from .probe import Verdict
from .probe_heads import HeadProbe
from .probe_streams import StreamProbe
from .sharding import is_sharded, model_processes

_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Known:
    """A verdict and the modules that it was found on."""

    verdict: Verdict
    modules: tuple[weakref.ref[nn.Module], ...]
    kinds: tuple[type, ...]
    forwards: tuple[int | None, ...]  # `own_forward` of each

    @classmethod
    def on(cls, modules: list[nn.Module], verdict: Verdict) -> _Known:
        kinds = tuple(plain_class(type(module)) for module in modules)
        return cls(verdict, tuple(map(weakref.ref, modules)), kinds, tuple(map(own_forward, modules)))

    def holds(self, modules: list[nn.Module]) -> bool:
        """Whether these are the same modules, of the same classes."""
        return len(modules) == len(self.modules) and all(
            reference() is module and kind is plain_class(type(module)) and forward == own_forward(module)
            for reference, kind, forward, module in zip(self.modules, self.kinds, self.forwards, modules, strict=True)
        )


def require_site(found: ModelLayout, site: str, layers: Iterable[int], *, now: bool = False) -> bool:
    """Raise a ValueError where the site of one of these layers is not what its name says.

    Args:
        found: the model's layout.
        site, layers: what is to be edited.
        now: check even where the model's weights are not in place yet (sharded, or not on a device).

    Returns:
        Whether the sites are known to be right. False: the model cannot run yet, so the check must be repeated before
        its first forward pass.
    """
    verdict = verdict_of(found, site, now=now)
    if verdict is None:
        return skipped()
    for layer in layers:
        if layer in verdict.reasons:
            raise ValueError(f"site: {site!r} at layer {layer} of {found.model_type!r}: {verdict.reasons[layer]}")
    return True


def idle_layers(found: ModelLayout, site: str, layers: Iterable[int]) -> list[int]:
    """Those of the layers where a factor on the site's output changes nothing, because a norm without scale follows.

    A head among several always acts. For a model that cannot run yet the result is empty.
    """
    if site == "head":
        layers = [layer for layer in layers if (found.heads[layer] or (0, 0))[0] == 1]
        site = "attn_out" if layers else site
    verdict = verdict_of(found, site) if site != "head" else None
    return [] if verdict is None else [layer for layer in layers if layer in verdict.idle]


def running_layers(found: ModelLayout, site: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the layers that run in a forward pass of text, as far as that is known; all of them where none runs."""
    verdict = verdict_of(found, site)
    running = layers if verdict is None else tuple(layer for layer in layers if layer not in verdict.absent)
    return running or layers


def verdict_of(found: ModelLayout, site: str, *, now: bool = False) -> Verdict | None:
    """The verdict on a site of all layers, new or known; None: the check is skipped, or the model cannot run yet."""
    if skipped():
        return None
    watched = _watched(found, site)
    implementation = str(getattr(getattr(found.decoder, "config", None), "_attn_implementation", None))
    key = (site, found.heads, found.projection, found.mlp, implementation)
    known = _verdicts.setdefault(found.decoder, {})
    if key in known and known[key].holds(watched):
        return known[key].verdict
    if not now and _cannot_run_yet(found.decoder):
        return None
    modules = {layer: found.site_module_or_none(site, layer) for layer in found.layers_of(site)}
    present = {layer: module for layer, module in modules.items() if module is not None}
    probe = HeadProbe(found, present) if site == "head" else StreamProbe(found, present, site)
    try:
        verdict, sure = _agreed(found, probe.verdict(), probe.sure)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: the short forward pass that verifies the structure of {type(found.decoder).__name__} failed: "
            f"{type(error).__name__}: {error}; set ACTSCALE_CHECK=0 to skip the check"
        ) from error
    if sure:
        known[key] = _Known.on(watched, verdict)
    return verdict


def _agreed(found: ModelLayout, verdict: Verdict, sure: bool) -> tuple[Verdict, bool]:
    """The verdict of all processes with this model: with tensor parallelism each has seen its own heads."""
    processes = model_processes(found.model)
    if processes.size == 1:
        return verdict, sure
    verdicts, sures = zip(*processes.all_gather((verdict, sure)), strict=True)
    reasons = {layer: reason for one in reversed(verdicts) for layer, reason in one.reasons.items()}
    idle = frozenset().union(*(one.idle for one in verdicts))
    return Verdict(reasons, idle, frozenset().union(*(one.absent for one in verdicts))), all(sures)


def skipped() -> bool:
    """Whether the environment switches the check off."""
    return os.environ.get("ACTSCALE_CHECK", "1").lower() in ("0", "off", "false", "no")


def _watched(found: ModelLayout, site: str) -> list[nn.Module]:
    """The modules that a verdict on a site depends on."""
    modules, path = list(found.layers), found.path_in_layer(site)
    if site == "head":
        tops = [layer.get_submodule(path.partition(".")[0]) for layer in found.layers if has(layer, path)]
        return modules + [module for top in tops for module in top.modules()]
    return modules + [layer.get_submodule(path) for layer in found.layers if has(layer, path)]


def _cannot_run_yet(decoder: nn.Module) -> bool:
    """Whether weights are not in place: sharded, or on no device and with nothing that fetches them.

    The processes that hold a sharded model all run its forward pass, but one of them may be patched by itself.
    """
    fetched = any("_hf_hook" in module.__dict__ for module in decoder.modules())
    return is_sharded(decoder) or any(p.is_meta and not fetched for p in decoder.parameters())
