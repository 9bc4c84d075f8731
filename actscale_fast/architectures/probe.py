"""The short forward passes that show what a model's sites are: rows of equal tokens, changed apart on their way.

`probe_heads` asks about the head site, `probe_streams` about the others; this file runs the model for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.hooks import suspended
from ..modules.without_side_effects import without_side_effects
from .arguments import accepted_arguments
from .layout import ModelLayout
from .sharding import refuse_dtensor

N_TOKENS = 4


@dataclass(frozen=True)
class Verdict:
    """What the check of one site showed, by layer."""

    reasons: Mapping[int, str]  # why the site of a layer is refused
    idle: frozenset[int]  # layers where a factor on the site's output changes nothing
    absent: frozenset[int] = frozenset()  # refused layers that do not run at all


class Probe:
    """Short forward passes of a decoder whose rows begin alike.

    Args:
        found: the model.
        modules: the module of the site in each layer to be checked.
    """

    def __init__(self, found: ModelLayout, modules: Mapping[int, nn.Module]) -> None:
        self.found, self.modules = found, modules
        self.calls = dict.fromkeys(range(found.n_layers), 0)  # of each layer
        self.uses = dict.fromkeys(modules, 0)  # of each site's module
        self.reasons: dict[int, str] = {}
        self.absent: set[int] = set()
        self.sure = True  # False: numbers that are zero or not finite have shown nothing
        self.n_rows = 1

    def verdict(self) -> Verdict:
        """Run the model and judge the site."""
        raise NotImplementedError

    def rows_of(self, x: Tensor) -> Tensor:
        """x [B, T, ...], or [B·T, ...] in families that flatten rows and tokens, with the rows apart."""
        refuse_dtensor(x)
        return x if x.shape[0] == self.n_rows else x.reshape(self.n_rows, -1, *x.shape[1:])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the calls of the layers in the passes inside; these leave no other trace in the model."""
        with without_side_effects(self.found.model), suspended(self.found.decoder), contextlib.ExitStack() as undo:
            for index, layer in enumerate(self.found.layers):

                def count(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                    self.calls[index] += 1

                undo.callback(layer.register_forward_pre_hook(count).remove)
            yield

    def run(self, **arguments: Any) -> Any:
        """One forward pass of the decoder on equal rows of a few tokens."""
        decoder = self.found.decoder
        embedding: Any = self.found.model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(embedding, "weight", None)
        n_known = int(getattr(embedding, "num_embeddings", 0) or self.found.vocabulary)
        ids = torch.tensor([[7, 11, 5, 13][:N_TOKENS]], dtype=torch.int64, device="cpu") % max(n_known, 1)
        device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else None
        ids = ids.repeat(self.n_rows, 1).to(device or torch.device("cpu"))
        if "use_cache" in accepted_arguments(decoder):  # type: ignore[arg-type]
            arguments.setdefault("use_cache", False)
        return decoder(input_ids=ids, **arguments)

    def refuse_unless_run_once(self) -> None:
        """Refuse the layers, and modules of the site, that did not run exactly once."""
        for layer in self.modules:
            for what, count in (("the layer", self.calls[layer]), ("its module", self.uses[layer])):
                if count != 1 and layer not in self.reasons:
                    times = "does not run" if not count else f"runs {count} times"
                    if not count:
                        self.absent.add(layer)
                    self.reasons[layer] = f"{what} {times} in a forward pass of text, expected once"
