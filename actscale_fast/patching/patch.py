"""`patch()`: apply an intervention, or several as one, to a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..architectures.layout import execution_device, layout
from ..interventions import Composite, Intervention
from ..modules.handle import Handle
from . import forward_context as contexts
from .attachment import Attachment
from .edits import Steering


def patch(
    model: nn.Module, intervention: Intervention, strength: float | Tensor = 1.0, group: Tensor | None = None
) -> Patch | Patches:
    """Apply an intervention to this model: until the `with` block ends, or until `.remove()`.

    The model's weights, module names and state_dict stay as they are. Patches nest, in the order in which they were
    applied; a `Composite` is applied as its parts would be one by one. Compiled models see the patch, its removal, and
    every change of the parameters' values. Parameters are moved to the model's device if they are elsewhere, and stay
    fp32 whatever the model's dtype. One forward pass at a time, and under gradient checkpointing the backward pass
    inside the `with` block.

    Args:
        model: the model that the intervention was made for, or another of its type and shape.
        intervention: its parameters get gradients; the model's weights may be frozen.
        strength: β, a float, or one value per row of the batch [B]; 0 is the identity, −1 inverts. In generate() a
            row's value serves all its beams or returned sequences. `Patch.strength` can be set anew at any time.
        group: int64 [B], for a stacked intervention: which of its G parts each row uses.

    Returns:
        The handle: a context manager with `.remove()`, `.strength` and `.prompt()`.

    Raises:
        TypeError, ValueError: an intervention of another model, non-finite parameters, or a bad strength or group. The
            model is then as it was.

    Example:
        >>> with patch(model, intervention, strength=-1.0):
        ...     model.generate(**inputs)
    """
    if isinstance(intervention, Composite):
        return Patches(model, intervention, strength, group)
    return Patch(model, intervention, strength, group)


class Patch(Steering, Handle):
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
        modules = {layer: found.site_module(location.site, layer) for layer in location.layers}
        super().__init__(intervention, execution_device(modules[location.layers[0]]), strength, group)
        self.counted = tuple(sorted(location.layers))
        if location.positions is not None and _learns_prompt(model):
            raise ValueError(
                "positions: PEFT puts virtual tokens before the prompt of this model, so that its positions cannot be "
                "told; steer every token (positions=None), or merge the tuned prompt into the text"
            )
        edits = [(modules[layer], edit) for layer, edit in self.edits()]
        self._attachment = Attachment(found, self, location.site, edits, location.layers)

    @contextlib.contextmanager
    def prompt(self, length: int, mask: Tensor | None = None) -> Iterator[None]:
        """Say how much of the sequence is prompt, for a decoding loop of your own; generate() says it by itself.

        Without it a forward pass with an empty cache is all prompt, and one with a filled cache all generated.

        Args:
            length: columns of the prompt, padding included.
            mask: [B, length], not 0 at its real tokens; None: the attention mask decides, or all are real.
        """
        with self._attachment.prompt(length, mask):
            yield

    def remove(self) -> None:
        """Take the intervention out of the model; nothing happens where it is out already, or the model is gone."""
        self._attachment.remove()

    @property
    def neighbours(self) -> tuple[contexts.Contextual, ...]:
        """All patches of the model, in the order in which they were applied."""
        return self._attachment.neighbours

    @property
    def alone(self) -> bool:
        """Whether the model has no other patch."""
        return self.neighbours == (self,)

    def carriers(self) -> list[nn.Module]:
        """The layers whose recomputation under gradient checkpointing needs this patch's context."""
        return self._attachment.carriers()


class Patches(Handle):
    """The applied parts of a `Composite`, as one handle; see `patch`."""

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
        """Which part of stacked interventions each row uses, int64 [B]. Set it for the next forward pass."""
        return self.parts[0].group

    @group.setter
    def group(self, value: Tensor | None) -> None:
        for part in self.parts:
            part.group = value

    @contextlib.contextmanager
    def prompt(self, length: int, mask: Tensor | None = None) -> Iterator[None]:
        """Say how much of the sequence is prompt; see `Patch.prompt`."""
        with self.parts[0].prompt(length, mask):
            yield

    def remove(self) -> None:
        """Take all parts out of the model; nothing happens where they are out already."""
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
        return self.parts[0].neighbours == tuple(self.parts)


AnyPatch = Patch | Patches


def _learns_prompt(model: nn.Module) -> bool:
    """Whether PEFT's prompt learning (prompt, prefix or p-tuning) is active on a model."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return bool(getattr(config, "is_prompt_learning", False))
