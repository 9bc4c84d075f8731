"""Edits attached to the modules of a model, with what tells them of each forward pass, and their way out again."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..architectures import site_check
from ..architectures.layout import ModelLayout, layout
from ..interventions import Prompt
from ..modules import hooks
from ..modules.module_paths import Links
from . import forward_context as contexts
from .checkpointing import Carrier


class Attachment:
    """What is attached for one patch; references to the model are weak.

    Args:
        found: the model.
        patch: gets `context` set for each forward pass, and is asked for it by `enter`.
        site: whose module's first input is edited at "head", whose output at the others.
        edits: the modules and what is done to them.
        layers: numbers of the steered layers.

    Raises:
        ValueError: the check shows that the site of a layer is not what its name says.
    """

    def __init__(
        self,
        found: ModelLayout,
        patch: contexts.Contextual,
        site: str,
        edits: Iterable[tuple[nn.Module, hooks.Edit]],
        layers: Sequence[int],
    ) -> None:
        self._patch = patch
        waiting = not site_check.require(found, site, layers)
        # Also at the site residual: early versions of transformers 5 checkpoint a layer together with its hooks.
        self._layers = [weakref.ref(found.layers[layer]) for layer in layers]
        self._model, self._decoder = weakref.ref(found.model), weakref.ref(found.decoder)
        self._edits: list[tuple[weakref.ref[nn.Module], hooks.Edit]] = []
        try:
            elsewhere = [layer for layer in found.layers_of(site) if layer not in set(layers)]
            steered, others = ([found.site_path(site, one) for one in some] for some in (layers, elsewhere))
            patch.links = Links(found.model, steered, others)
            self._calls = contexts.join(found.decoder, found.model, patch)
            for module, edit in edits:
                self._edits.append((weakref.ref(module), edit))
                hooks.attach(module, edit, before=site == "head")
            if waiting:
                late = functools.partial(_check_late, self._model, found.paths, site, tuple(layers))
                self._calls.pending.append((patch, late))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the edits out of the model; nothing happens where they are out already, or the model is gone."""
        for reference, edit in self._edits:
            module = reference()
            if module is not None:
                hooks.detach(module, edit)
        self._edits.clear()
        for layer in self.carriers():
            Carrier.remove(layer)  # the next training pass puts it back where another patch needs it
        self._layers.clear()
        decoder, model = self._decoder(), self._model()
        if decoder is None or not contexts.part(decoder, self._patch) or model is None:
            return
        if model is not decoder and hooks.record_of(model):  # generate(), wrapped for the first patch
            hooks.unmark(model)

    def carriers(self) -> list[nn.Module]:
        """The layers whose recomputation under gradient checkpointing needs the patch's context."""
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    @property
    def neighbours(self) -> tuple[contexts.Contextual, ...]:
        """All patches of the model, in the order in which they were applied."""
        decoder = self._decoder()
        return () if decoder is None else contexts.patches_of(decoder)

    @contextlib.contextmanager
    def prompt(self, length: int, mask: Tensor | None = None) -> Iterator[None]:
        """Say how much of the sequence is prompt; see `Patch.prompt`."""
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (B, {length})")
        with self._calls.says(Prompt(length, None if mask is None else mask != 0)):
            yield


def _check_late(model: weakref.ref[nn.Module], paths: dict[str, str], site: str, layers: tuple[int, ...]) -> None:
    """The check that had to wait for the model's first forward pass."""
    found = model()
    if found is not None:
        site_check.require(layout(found, paths), site, layers, now=True)
