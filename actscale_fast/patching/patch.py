"""`patch()`: apply an intervention, or several as one, to a model. docs/architecture/patching.md draws the way."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..architectures import site_check
from ..architectures.hugging_face import execution_device
from ..architectures.layout import ModelLayout, layout
from ..architectures.model_origin import warn_of_other_weights
from ..interventions import Composite, Intervention
from ..modules import hooks
from ..modules.handle import Handle
from ..modules.module_paths import ModulePaths
from .announced_prompt import AnnouncedPrompt
from .checkpointing import CheckpointWithContexts
from .edits import Steering
from .forward_call import Prompt
from .forward_context import ActivePatch, patches_of
from .forward_hooks import join, leave
from .readable_patch import ReadablePatch


def patch(
    model: nn.Module, intervention: Intervention, strength: float | Tensor = 1.0, group: Tensor | None = None
) -> Patch | Patches:
    """Apply an intervention to this model: until the `with` block ends, or until `.remove()`.

    The model's weights, module names and state_dict stay as they are. Patches nest, in the order in which they were
    applied; the parts of a `Composite` are applied one by one. Compiled models see the patch, its removal, and every
    change of the parameters' values. Parameters are moved to the model's device if they are elsewhere, and stay fp32
    whatever the model's dtype is. Run one forward pass at a time; under gradient checkpointing, run the backward pass
    inside the `with` block.

    Args:
        model: the model that the intervention was made for, or another one of its type and shape.
        intervention: its parameters get gradients; the model's weights may be frozen.
        strength: β, a float, or one value per row of the batch [B]; 0 is the identity, −1 inverts. In generate() the
            value of a row serves all its beams or returned sequences. `Patch.strength` can be set again at any time.
        group: int64 [B], for a stacked intervention: which of its G parts each row uses.

    Returns:
        The handle: a context manager with `.remove()`, `.strength` and `.prompt()`.

    Warns:
        UserWarning: once for each model, where it has other weights than the one that the intervention was made for.

    Raises:
        TypeError, ValueError: an intervention for another model, non-finite parameters, or a bad strength or group. The
            model is then unchanged.

    Example:
        >>> with patch(model, intervention, strength=-1.0):
        ...     model.generate(**inputs)
    """
    if isinstance(intervention, Composite):
        return Patches(model, intervention, strength, group)
    return Patch(model, intervention, strength, group)


class AttachedPatch(ActivePatch, Handle):
    """A patch whose edits are attached to the modules of a model; its references to the model are weak."""

    def _attach(
        self,
        found: ModelLayout,
        site: str,
        layers: Sequence[int],
        edits: Iterable[tuple[nn.Module, hooks.Edit]],
    ) -> None:
        """Attach the edits.

        Args:
            found: the model.
            site: an edit at "head" changes its module's first input, at the other sites the module's output.
            layers: the numbers of the edited layers.
            edits: the modules, and what is done to each.

        Raises:
            ValueError: the check shows that the site of a layer is not what its name says.
        """
        must_wait = not site_check.require_site(found, site, layers)
        # Also at the site residual: early versions of transformers 5 checkpoint a layer together with its hooks.
        self._layers = [weakref.ref(found.layers[layer]) for layer in layers]
        self._model, self._decoder = weakref.ref(found.model), weakref.ref(found.decoder)
        self._edits: list[tuple[weakref.ref[nn.Module], hooks.Edit]] = []
        try:
            elsewhere = [layer for layer in found.layers_of(site) if layer not in set(layers)]
            edited, others = ([found.site_path(site, layer) for layer in some] for some in (layers, elsewhere))
            self.module_paths = ModulePaths(found.model, edited, others)
            self._model_patches = join(found.decoder, found.model, self)
            for module, edit in edits:
                self._edits.append((weakref.ref(module), edit))
                hooks.attach(module, edit, before=site == "head")
            if must_wait:
                check = functools.partial(_check_late, self._model, found.paths, site, tuple(layers))
                self._model_patches.pending.append((self, check))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the patch off the model. Nothing happens where it is off already, or where the model is gone."""
        for reference, edit in self._edits:
            module = reference()
            if module is not None:
                hooks.detach(module, edit)
        self._edits.clear()
        for layer in self.checkpointed_layers():
            CheckpointWithContexts.remove(layer)  # the next training pass puts it back where another patch needs it
        self._layers.clear()
        decoder = self._decoder()
        if decoder is not None:
            leave(decoder, self._model(), self)

    def checkpointed_layers(self) -> list[nn.Module]:
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    @contextlib.contextmanager
    def prompt(self, length: int, mask: Tensor | None = None) -> Iterator[None]:
        """Say how much of the sequence is prompt, for a decoding loop of your own; generate() says it by itself.

        Without it, a forward pass with an empty cache is all prompt, and one with a filled cache is all generated.

        Args:
            length: the columns of the prompt, padding included.
            mask: [B, length], not 0 at its real tokens; None: the attention mask decides, or all tokens are real.
        """
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (B, {length})")
        prompt = Prompt(length, None if mask is None else mask != 0)
        with self._model_patches.announcing(AnnouncedPrompt(prompt, every_pass=True)):
            yield

    def are_all(self, patches: Sequence[ActivePatch]) -> bool:
        """Whether these are all patches of the model, in this order."""
        decoder = self._decoder()
        return decoder is not None and patches_of(decoder) == tuple(patches)


class Patch(ReadablePatch, Steering, AttachedPatch):
    """An applied intervention; see `patch`."""

    def __init__(
        self,
        model: nn.Module,
        intervention: Intervention,
        strength: float | Tensor = 1.0,
        group: Tensor | None = None,
    ) -> None:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
        location = intervention.location
        found = layout(model, location.paths)
        location.model.require(found.fingerprint)
        warn_of_other_weights(found.model, location.origin, stacklevel=3)
        modules = {layer: found.site_module(location.site, layer) for layer in location.layers}
        super().__init__(intervention, execution_device(modules[location.layers[0]]), strength, group)
        self.counted = tuple(sorted(location.layers))
        if location.positions is not None and _learns_prompt(model):
            raise ValueError(
                "positions: PEFT puts virtual tokens before the prompt of this model, so that its positions cannot be "
                "told; steer every token (positions=None), or merge the tuned prompt into the text"
            )
        self._attach(
            found, location.site, location.layers, [(modules[layer], edit) for layer, edit in self.edits(modules)]
        )

    @property
    def alone(self) -> bool:
        """Whether the model has no other patch."""
        return self.are_all([self])

    def _patched_model(self) -> nn.Module | None:
        return self._model() if self._edits else None

    def _is_paused(self) -> bool:
        return self.paused


class Patches(ReadablePatch, Handle):
    """The applied parts of a `Composite`, as one handle; see `patch`."""

    intervention: Composite

    def __init__(self, model: nn.Module, composite: Composite, strength: float | Tensor, group: Tensor | None) -> None:
        self.intervention = composite
        self.parts: list[Patch] = []
        try:
            for part in composite.singles:
                self.parts.append(Patch(model, part, strength, group))
            self.strength = strength
        except BaseException:
            self.remove()
            raise

    @property
    def strength(self) -> float | Tensor:
        """β of the whole: a float, or one value per row [B]. Setting it takes effect with the next forward pass."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        for part, factor in zip(self.parts, self.intervention.factors, strict=True):
            part.strength = value
            part.strength = factor * part.strength
        self._strength = value

    @property
    def group(self) -> Tensor | None:
        """The part of stacked interventions that each row uses, int64 [B]. Set it for the next forward pass."""
        return self.parts[0].group

    @group.setter
    def group(self, value: Tensor | None) -> None:
        for part in self.parts:
            part.group = value

    def prompt(self, length: int, mask: Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Say how much of the sequence is prompt; see `Patch.prompt`."""
        return self.parts[0].prompt(length, mask)

    def remove(self) -> None:
        """Take all parts off the model. Nothing happens where they are off already."""
        for part in reversed(self.parts):
            part.remove()

    def set_rows(self, strength: float | Tensor, group: Tensor | None) -> None:
        """Strength and group of the next forward pass, unchecked; see `Patch.set_rows`."""
        for part, factor in zip(self.parts, self.intervention.factors, strict=True):
            part.set_rows(strength if factor == 1.0 else factor * strength, group)

    @property
    def paused(self) -> bool:
        """While True, a forward pass edits nothing."""
        return self.parts[0].paused

    @paused.setter
    def paused(self, value: bool) -> None:
        for part in self.parts:
            part.paused = value

    @property
    def alone(self) -> bool:
        """Whether the model has no patch but these."""
        return self.parts[0].are_all(self.parts)

    def _patched_model(self) -> nn.Module | None:
        return self.parts[0]._patched_model()

    def _is_paused(self) -> bool:
        return self.paused


AnyPatch = Patch | Patches


def _check_late(model: weakref.ref[nn.Module], paths: dict[str, str], site: str, layers: tuple[int, ...]) -> None:
    """The site check that had to wait for the model's first forward pass."""
    found = model()
    if found is not None:
        site_check.require_site(layout(found, paths), site, layers, now=True)


def _learns_prompt(model: nn.Module) -> bool:
    """Whether PEFT's prompt learning (prompt, prefix or p-tuning) is active on a model."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return bool(getattr(config, "is_prompt_learning", False))
