"""The site after a norm that undoes factors: some models normalise what a branch returns (Gemma 2 and 3, OLMo 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.hooks import first_of
from .layout import ModelLayout, layout
from .probe import Probe
from .site_check import idle_layers, require_site, skipped


def site_after_norm(found: ModelLayout, site: str, layers: Sequence[int]) -> str | None:
    """The path of the norm that follows a site, if scalars act on that norm's output; None: there is none.

    Args:
        found: the model.
        site: "attn_out" or "mlp_out".
        layers: layers where a factor on the site's output changes nothing.

    The path is given as `mlp=` together with site="mlp_out", which then means the norm's output; a short forward pass
    shows that factors act there.
    """
    if site not in ("attn_out", "mlp_out") or not layers or skipped():
        return None
    try:
        path = _FollowingModule(found, site, layers[0]).path()
        if path is None:
            return None
        after = layout(found.model, found.paths | {"mlp": path})
        require_site(after, "mlp_out", layers)
        return None if idle_layers(after, "mlp_out", layers) else path
    except ValueError:  # not every layer has it, or it is something else there
        return None


def offer_of_site_after_norm(found: ModelLayout, site: str, layers: Sequence[int]) -> str:
    """The end of a message about an idle site: what to pass instead; "" if there is nothing to offer."""
    path = site_after_norm(found, site, layers)
    return "" if path is None else f"; that norm's output can be scaled: for_model(..., site='mlp_out', mlp={path!r})"


class _FollowingModule(Probe):
    """Finds the module of a layer that takes what the site's module returned."""

    def __init__(self, found: ModelLayout, site: str, layer: int) -> None:
        module = found.site_module(site, layer)
        super().__init__(found, {layer: module})
        self.module, self.layer = module, found.layers[layer]
        self.output: Tensor | None = None
        self.following: list[str] = []

    def path(self) -> str | None:
        """Its path from the layer; None: no module takes it."""
        with self.watching(), contextlib.ExitStack() as hooks, torch.no_grad():
            hooks.callback(self.module.register_forward_hook(self._note_output).remove)
            for path, module in self.layer.named_modules():
                if module is not self.module and not any(True for _ in module.children()):
                    hooks.callback(module.register_forward_pre_hook(self._compare(path), with_kwargs=True).remove)
            self.run()
        return self.following[0] if self.following else None

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.output = first_of(output)

    def _compare(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            taken = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if taken is None or not isinstance(self.output, Tensor) or taken.shape != self.output.shape:
                return
            if taken.data_ptr() == self.output.data_ptr():  # the output is still held, so its memory is its own
                self.following.append(path)

        return hook
