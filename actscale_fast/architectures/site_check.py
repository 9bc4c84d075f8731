"""The model itself is asked whether its sites are what their names say: one short forward pass per site and model.

Head site: rows that differ in nothing but the factors by which attention's result is scaled, head by head, must differ
in just these factors where they enter the output projection. A norm over all heads, the difference of two heads, or
heads in another order in between are found that way, whatever a family is called. Whole sites: rows in which the site's
output is doubled or negated must differ after the layer; where doubling changes nothing, because a norm without scale
follows, scalars cannot act. Every steered module must run once in a pass.

The passes are in `probe`. The verdict is kept for the model. `ACTSCALE_CHECK=0` skips the check.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..modules import hooks
from ..modules.module_paths import own_forward
from .detect import has
from .probe import Probe, Verdict

if TYPE_CHECKING:
    from .layout import ModelLayout

_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Known:
    """A verdict and the modules that it was found on."""

    verdict: Verdict
    modules: tuple[weakref.ref[nn.Module], ...]
    kinds: tuple[type, ...]
    forwards: tuple[int | None, ...]  # those that were put on an instance

    def holds(self, modules: list[nn.Module]) -> bool:
        """Whether these are the same modules, of the same classes."""
        return len(modules) == len(self.modules) and all(
            reference() is module and kind is hooks.plain_class(type(module)) and forward == own_forward(module)
            for reference, kind, forward, module in zip(self.modules, self.kinds, self.forwards, modules, strict=True)
        )


def require_site(found: ModelLayout, site: str, layers: Iterable[int], *, now: bool = False) -> bool:
    """Raise a ValueError where the site of one of these layers is not what its name says.

    Args:
        found: the model's layout.
        site, layers: what is to be steered.
        now: also where the model's weights are not in place before a forward pass (sharded, or on no device yet).

    Returns:
        Whether that is known; False: the model cannot run yet, so that the check waits for its first forward pass.
    """
    verdict = verdict_of(found, site, now=now)
    if verdict is None:
        return skipped()
    for layer in layers:
        if layer in verdict.reasons:
            raise ValueError(f"site: {site!r} at layer {layer} of {found.model_type!r}: {verdict.reasons[layer]}")
    return True


def idle_layers(found: ModelLayout, site: str, layers: Iterable[int]) -> list[int]:
    """Those of the layers where a factor on the site's output changes nothing: a norm without scale follows it.

    A head among others always acts. Nothing is said of a model that cannot run yet.
    """
    if site == "head":
        layers = [layer for layer in layers if (found.heads[layer] or (0, 0))[0] == 1]
        site = "attn_out" if layers else site
    verdict = verdict_of(found, site) if site != "head" else None
    return [] if verdict is None else [layer for layer in layers if layer in verdict.idle]


def running_layers(found: ModelLayout, site: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the layers that run in a forward pass of text, as far as that is known; all where none does."""
    verdict = verdict_of(found, site)
    running = layers if verdict is None else tuple(layer for layer in layers if layer not in verdict.absent)
    return running or layers


def verdict_of(found: ModelLayout, site: str, *, now: bool = False) -> Verdict | None:
    """The verdict on a site of all layers, from the model or as it is known; None: skipped, or it has to wait."""
    if skipped():
        return None
    watched = _watched(found, site)
    key = (site, found.heads, found.projection, found.mlp, _implementation(found))
    known = _verdicts.setdefault(found.decoder, {})
    if key in known and known[key].holds(watched):
        return known[key].verdict
    if not now and _must_wait(found.decoder):
        return None
    modules = {layer: found.site_module_or_none(site, layer) for layer in found.layers_of(site)}
    probe = Probe(found, {layer: module for layer, module in modules.items() if module is not None})
    try:
        verdict = probe.heads() if site == "head" else probe.whole(site)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: a short test pass of {type(found.decoder).__name__}, which shows that its parts are what they are "
            f"taken for, failed: {type(error).__name__}: {error}; set ACTSCALE_CHECK=0 to skip the check"
        ) from error
    if probe.sure:
        known[key] = _Known(
            verdict,
            tuple(weakref.ref(module) for module in watched),
            tuple(hooks.plain_class(type(module)) for module in watched),
            tuple(own_forward(module) for module in watched),
        )
    return verdict


def skipped() -> bool:
    """Whether the environment switches the check off."""
    return os.environ.get("ACTSCALE_CHECK", "1").lower() in ("0", "off", "false", "no")


def _watched(found: ModelLayout, site: str) -> list[nn.Module]:
    """The modules that a verdict on a site depends on."""
    modules = list(found.layers)
    path = {"residual": "", "mlp_out": found.mlp, "attn_out": found.projection}.get(site, found.projection)
    if site == "head":
        tops = [layer.get_submodule(path.partition(".")[0]) for layer in found.layers if has(layer, path)]
        return modules + [module for top in tops for module in top.modules()]
    return modules + [layer.get_submodule(path) for layer in found.layers if has(layer, path)]


def _implementation(found: ModelLayout) -> str:
    return str(getattr(getattr(found.decoder, "config", None), "_attn_implementation", None))


def _must_wait(decoder: nn.Module) -> bool:
    """Whether weights are not in place yet: on no device without anybody to fetch them, or sharded."""
    fetched = any("_hf_hook" in module.__dict__ for module in decoder.modules())
    return any((p.is_meta and not fetched) or type(p).__name__ == "DTensor" for p in decoder.parameters())
