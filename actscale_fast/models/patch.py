"""One intervention at work in a model: its edits, its strength, and the context of each forward pass."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..interventions import Intervention, Placement, Prompt
from ..interventions.positions import EVERYWHERE
from . import context as contexts
from . import surgery
from .adapter import execution_device, layout
from .placement import per_row, place
from .recompute import Carrier


class _Edit:
    """One layer's edit: reads the context of the running forward pass and hands the activation to the intervention."""

    def __init__(self, patch: Patch, layer: int) -> None:
        location = patch.intervention.location
        self.patch = patch
        self.intervention = patch.intervention
        self.layer = layer
        self.n_heads, self.width = location.n_heads, location.width

    def __call__(self, x: Tensor) -> Tensor:
        context = self.patch.context or self.patch.outside(x)
        if context.device is not None:
            context = context.on(x.device)
        if context.placement is None:
            return x
        if x.dim() == 2:  # OPT flattens rows and tokens
            return self(x.unflatten(0, (context.n_rows or 1, -1))).flatten(0, 1)
        edit = self.intervention.edit
        if self.n_heads == 1:
            return edit(x.unsqueeze(2), self.layer, context.strength, context.placement).squeeze(2)
        heads = x.unflatten(2, (self.n_heads, self.width))
        return edit(heads, self.layer, context.strength, context.placement).flatten(2)


class Patch:
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
        intervention.check_finite()
        modules = [found.site_module(location.site, layer) for layer in location.layers]
        device = execution_device(modules[0])
        self.intervention = intervention
        self.context: contexts.Context | None = None
        self._home = device or intervention.device
        self._group = _checked_group(group, intervention.n_groups, self._home)
        self._plain = contexts.Context(EVERYWHERE, 1.0)
        #: While True, a forward pass edits nothing.
        self.paused = False
        self.strength = strength
        if isinstance(self._strength, Tensor) and not bool(torch.isfinite(self._strength).all()):
            raise ValueError("strength: some of its values are not finite")
        if device is not None and intervention.device != device:
            intervention.to(device)
        # Also at the site residual: early versions of transformers 5 checkpoint a layer together with its hooks.
        self._layers = [weakref.ref(found.layers[layer]) for layer in location.layers]
        self._model, self._decoder = weakref.ref(found.model), weakref.ref(found.decoder)
        self._edits: list[tuple[weakref.ref[nn.Module], _Edit]] = []
        try:
            self._calls = contexts.join(found.decoder, found.model, self)
            for index, module in enumerate(modules):
                edit = _Edit(self, index)
                self._edits.append((weakref.ref(module), edit))
                surgery.attach(module, edit, before=location.site == "head")
        except BaseException:
            self.remove()
            raise

    @property
    def strength(self) -> float | Tensor:
        """β: a float, or one value per row [B]. Setting it takes effect with the next forward pass."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.dim() != 1 or not value.numel() or value.requires_grad or value.is_complex():
                raise ValueError(
                    f"strength: got shape {tuple(value.shape)}, expected a float or a tensor [B] without gradient"
                )
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            self._strength: float | Tensor = value.to(self._home, dtype)
        else:
            self._strength = one_strength(value, "a float or a tensor [B]")
        self._plain = contexts.Context(EVERYWHERE, self._strength)

    @property
    def group(self) -> Tensor | None:
        """Which part of a stacked intervention each row uses, int64 [B]. Set it for the next forward pass.

        A tensor on the CPU is checked there; one on a GPU is waited for.
        """
        return self._group

    @group.setter
    def group(self, value: Tensor | None) -> None:
        self._group = _checked_group(value, self.intervention.n_groups, self._home)

    def set_rows(self, strength: float | Tensor, group: Tensor | None) -> None:
        """Strength and group of the next forward pass, unchecked: never waits for the device. For a loop of one's own.

        Args:
            strength: a float, or fp32 [B] on the device of the steered layers.
            group: int64 [B] there, each below the number of groups; a row of another one becomes NaN.
        """
        self._strength, self._group = strength, group
        self._plain = contexts.Context(EVERYWHERE, strength)

    @property
    def _rowwise(self) -> bool:
        return isinstance(self._strength, Tensor) or self._group is not None

    @contextlib.contextmanager
    def prompt(self, length: int, mask: Tensor | None = None) -> Iterator[None]:
        """Say how much of the sequence is prompt, for a decoding loop of your own; generate() says it by itself.

        Without it a forward pass with an empty cache is all prompt, and one with a filled cache all generated.

        Args:
            length: columns of the prompt, padding included.
            mask: [B, length], not 0 at its real tokens; None: the attention mask decides, or all are real.
        """
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != length):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (B, {length})")
        with self._calls.announced(Prompt(length, None if mask is None else mask != 0)):
            yield

    def remove(self) -> None:
        """Take the intervention out of the model; nothing happens where it is out already, or the model is gone."""
        for reference, edit in self._edits:
            module = reference()
            if module is not None:
                surgery.detach(module, edit)
        self._edits.clear()
        for layer in self.carriers():
            Carrier.remove(layer)  # the next training pass puts it back where another patch needs it
        self._layers.clear()
        decoder, model = self._decoder(), self._model()
        if decoder is not None and contexts.part(decoder, self) and model is not None and surgery.record_of(model):
            surgery.unmark(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def neighbours(self) -> tuple[contexts.Contextual, ...]:
        """All patches of the model, in the order in which they were applied."""
        decoder = self._decoder()
        return () if decoder is None else contexts.patches_of(decoder)

    @property
    def alone(self) -> bool:
        """Whether the model has no other patch."""
        return self.neighbours == (self,)

    def carriers(self) -> list[nn.Module]:
        """The layers whose recomputation under gradient checkpointing needs this patch's context."""
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    def enter(self, call: contexts.Call) -> contexts.Context:
        """The context of one forward pass."""
        location = self.intervention.location
        if self.paused:
            return contexts.Context(None, 0.0)
        if self.intervention.needs_source and call.prompt is None:  # generate() repeats a prompt's row for its beams
            self.intervention.check_source(call.n_rows)
        if location.positions is None and not self._rowwise:
            return contexts.Context(EVERYWHERE, self._strength, call.n_rows)
        if call.packed:
            raise ValueError(
                "positions, strength, group: packed sequences have no rows to place them by; pad the batch"
            )
        strength, group = self._strength, self._group
        if isinstance(strength, Tensor):
            strength = per_row("strength", strength, call).to(self._home)
        if group is not None:
            group = per_row("group", group, call).to(self._home)
        placement: Placement | None = Placement(group=group)
        if location.positions is not None:
            placement = place(self.intervention, call, group, self._home)
        return contexts.Context(placement, strength, call.n_rows, self._home)

    def outside(self, x: Tensor) -> contexts.Context:
        """The context of a layer that was called by itself, or of a repetition that no carrier could reach."""
        if self.intervention.location.positions is not None:
            raise RuntimeError(
                "positions: a steered layer ran outside its model's forward pass, so its tokens are unknown"
            )
        if not self._rowwise:
            return self._plain
        return contexts.Context(Placement(group=self._group), self._strength, None, self._home)


def one_strength(value: object, expected: str) -> float:
    """β as a float; TypeError or ValueError, naming what was expected, where it is no finite number."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"strength: got {type(value).__name__}, expected {expected}") from None
    if not math.isfinite(number):
        raise ValueError(f"strength: got {number}, expected a finite number")
    return number


def _checked_group(group: object, n_groups: int | None, device: torch.device) -> Tensor | None:
    if group is None:
        if n_groups is not None and n_groups > 1:
            raise ValueError(f"group: got None for {n_groups} stacked interventions, expected an int64 tensor [B]")
        return None
    if not isinstance(group, Tensor) or group.dtype not in (torch.int64, torch.int32) or group.dim() != 1:
        raise TypeError(f"group: got {type(group).__name__}, expected an int64 tensor [B]")
    if n_groups is None:
        raise ValueError("group: the intervention is not a stack of several; see Intervention.stack")
    if group.numel() and not (int(group.min()) >= 0 and int(group.max()) < n_groups):
        raise ValueError(f"group: got values {int(group.min())} to {int(group.max())}, expected 0 to {n_groups - 1}")
    return group.to(device, torch.int64, non_blocking=True)
