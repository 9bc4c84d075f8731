"""One intervention at work in a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..interventions import Intervention
from . import context as contexts
from .adapter import execution_device, layout
from .attachment import Attachment
from .handle import Handle
from .steering import Steering


class Patch(Steering, Handle):
    """An applied intervention; see `applying.patch`."""

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


def _learns_prompt(model: nn.Module) -> bool:
    """Whether PEFT's prompt learning (prompt, prefix or p-tuning) is active on a model."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return bool(getattr(config, "is_prompt_learning", False))
