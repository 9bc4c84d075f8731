"""How many attention heads each layer has, and how wide they are."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .parts import attribute, config_value, in_features, kind_of, positive_int

#: Classes that stand in the place of attention but have no heads that attend: linear attention and the like.
NO_ATTENTION = re.compile(
    r"linear|lightning|delta|kda|gla|mamba|lstm|retention|recurrent|conv|mixer|ssm|rwkv", re.IGNORECASE
)
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "n_local_heads", "nh")
_CONFIG_COUNTS = ("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads")
_WIDTHS = ("v_head_dim", "head_dim", "head_size")


class ConfigHeads:
    """What a config says about heads, read once for all layers."""

    def __init__(self, config: Any) -> None:
        self._counts = [config_value(config, name) for name in _CONFIG_COUNTS]
        found = [config_value(config, name) for name in ("v_head_dim", "head_dim")]
        self.widths = [width for width in found if isinstance(width, int)]

    def count(self, index: int | None = None) -> int | None:
        """The number of heads of a layer; without an index, the first number that there is."""
        for value in self._counts:
            if isinstance(value, list | tuple) and value:
                value = value[0 if index is None else min(index, len(value) - 1)]
            if positive_int(value):
                return int(value)
        return None


def heads_of(layer: nn.Module, projection: str, config: ConfigHeads, index: int) -> tuple[int, int] | None:
    """(heads, their width) of a layer; None: it has no such projection.

    The number is the attention module's own where it has one, else the config's. That the projection's input is these
    heads side by side is left to the site check.

    Raises:
        ValueError: the projection's input is not a whole number of vectors, one per head, or their width is another
            than attention and config say.
    """
    around = _modules_along(layer, projection)
    if around is None:
        return None
    module = around.pop()
    width = in_features(module)
    if width is None or NO_ATTENTION.search(kind_of(around[-1] if around else None, layer)):
        return None
    own = [size for name in _WIDTHS if (size := _size_in(around, (name,))) is not None]
    widths = own + config.widths
    count = _size_in(around, _HEAD_COUNTS) or config.count(index) or (width // (widths or [width])[0])
    if width % count or (widths and width // count not in widths):
        size = (widths or [width // count])[0]
        raise ValueError(
            f"layers: the projection {projection!r} of layer {index} takes {width} inputs, expected {count} heads · "
            f"{size} = {count * size}"
        )
    return count, width // count


def _modules_along(layer: nn.Module, path: str) -> list[nn.Module] | None:
    """The modules that a path passes, outermost first; None: it leads to no module."""
    found: list[nn.Module] = []
    for name in path.split("."):
        module = getattr(found[-1] if found else layer, name, None)
        if not isinstance(module, nn.Module):
            return None
        found.append(module)
    return found


def _size_in(modules: list[nn.Module], names: tuple[str, ...]) -> int | None:
    """The size that the innermost of these modules has under one of the names."""
    for module in reversed(modules):
        for name in names:
            size = positive_int(attribute(module, name))
            if size:
                return size
    return None
