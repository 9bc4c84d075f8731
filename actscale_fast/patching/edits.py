"""What a patch does to an activation: the edit of each layer, and the context that it reads in a forward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..architectures.own_heads import own_heads
from ..architectures.sharding import refuse_dtensor
from ..interventions import Intervention, Placement
from ..interventions.placement import EVERYWHERE
from .forward_call import Call
from .forward_context import ActivePatch, Context
from .token_slots import per_row, place, refuse_several_sequences


class LayerEdit:
    """The edit of one layer: hands the activation to the intervention, with the context of the running pass."""

    def __init__(self, steering: Steering, index: int, projection: nn.Module | None = None) -> None:
        location = steering.intervention.location
        self.steering = steering
        self.intervention = steering.intervention
        self.index = index  # among the chosen layers
        self.layer = location.layers[index]  # in the model
        self.whole = location.site != "head"
        self.n_heads, self.width = location.sizes_of(index)
        self._projection = None if projection is None else weakref.ref(projection)  # as all references of a patch
        self.takes_own_heads = steering.intervention.takes_own_heads()

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, T, H·D] or [B, T, d], or with rows and tokens flattened; returns the edited activation."""
        refuse_dtensor(x)
        context = self.steering.context or self.steering.context_outside(x)
        if context.device is not None:
            context = context.on(x.device)
        if context.placement is None:
            return x
        if x.dim() == 2:  # OPT flattens rows and tokens
            return self(x.unflatten(0, (context.n_rows or 1, -1))).flatten(0, 1)
        context.use(self.layer)
        placement = context.placement
        if placement.index is not None and x.shape[1] != placement.index.shape[1]:
            if x.shape[1] != context.n_last:
                raise RuntimeError(
                    f"positions: a layer got {x.shape[1]} tokens, but the model was given {placement.index.shape[1]}: "
                    "it adds tokens of its own, so that positions cannot be told"
                )
            placement = placement.last(x.shape[1])  # Gemma 4: layers that share keys get the wanted tokens only
        if self.whole:
            return self.intervention.edit(x.unsqueeze(2), self.index, context.strength, placement).squeeze(2)
        projection = None if self._projection is None else self._projection()
        own = own_heads(projection, x.shape[-1], self.n_heads, self.width)
        heads = x.unflatten(-1, (-1, self.width))  # [B, T, H, D]
        if own is None:
            return self.intervention.edit(heads, self.index, context.strength, placement).flatten(2)
        if self.takes_own_heads:
            placement = replace(placement, heads=own)
            return self.intervention.edit(heads, self.index, context.strength, placement).flatten(2)
        edited = self.intervention.edit(own.join(heads, 2), self.index, context.strength, placement)
        return own.take(edited, 2).flatten(2)


class Steering(ActivePatch):
    """An intervention at one location with its strength and groups; by itself it is not attached to a model.

    Whoever calls its edits sets `context` to the result of `context_of` for each forward pass.

    Args:
        intervention: moved to the device if it is elsewhere.
        device: where the edited layers compute; None: not known, so the intervention stays where it is.
        strength, group: as `patch` takes them.
    """

    def __init__(
        self, intervention: Intervention, device: torch.device | None, strength: float | Tensor, group: Tensor | None
    ) -> None:
        intervention.check_finite()
        self.intervention = intervention
        #: While True, a forward pass edits nothing.
        self.paused = False
        self._home = device or intervention.device
        self._group = _checked_group(group, intervention.n_groups, self._home)
        self.strength = strength
        if isinstance(self._strength, Tensor) and not bool(torch.isfinite(self._strength).all()):
            raise ValueError("strength: some of its values are not finite")
        if device is not None and intervention.device != device:
            intervention.to(device)

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
        self._outside = Context(EVERYWHERE, self._strength)

    @property
    def group(self) -> Tensor | None:
        """The part of a stacked intervention that each row uses, int64 [B]. Set it for the next forward pass.

        The values are checked, so setting a tensor on a GPU waits for that GPU.
        """
        return self._group

    @group.setter
    def group(self, value: Tensor | None) -> None:
        self._group = _checked_group(value, self.intervention.n_groups, self._home)

    def set_rows(self, strength: float | Tensor, group: Tensor | None) -> None:
        """Set strength and group for the next forward pass without checks, and so without waiting for the device.

        Args:
            strength: a float, or fp32 [B] on the device of the steered layers.
            group: int64 [B] there, each below the number of groups; a row with another value becomes NaN.
        """
        self._strength, self._group = strength, group
        self._outside = Context(EVERYWHERE, strength)

    @property
    def reads_arguments(self) -> bool:
        return self._rowwise or self.reads_positions

    @property
    def reads_positions(self) -> bool:
        return self.intervention.location.positions is not None

    @property
    def _rowwise(self) -> bool:
        return isinstance(self._strength, Tensor) or self._group is not None

    def edits(self, modules: Mapping[int, nn.Module] | None = None) -> Iterator[tuple[int, LayerEdit]]:
        """(number of the layer in the model, its edit) for each steered layer.

        Args:
            modules: the modules of the site by layer, which say what tensor parallelism shards; None: not known.
        """
        for index, layer in enumerate(self.intervention.location.layers):
            yield layer, LayerEdit(self, index, (modules or {}).get(layer))

    def context_of(self, call: Call) -> Context:
        """The context of one forward pass: which slot of the parameters each token uses, and β for each row."""
        if self.paused:
            return Context(None, 0.0)
        if self.intervention.needs_source and call.prompt is None:  # generate() repeats a prompt's row for its beams
            self.intervention.check_source(call.n_rows)
        if not self.reads_arguments:
            return Context(EVERYWHERE, self._strength, call.n_rows)
        if call.packed:
            raise ValueError(
                "positions, strength, group: packed sequences have no rows to place them by; pad the batch"
            )
        if self._rowwise:
            refuse_several_sequences("strength, group", call)
        strength, group = self._strength, self._group
        if isinstance(strength, Tensor):
            strength = per_row("strength", strength, call).to(self._home)
        if group is not None:
            group = per_row("group", group, call).to(self._home)
        placement: Placement | None = Placement(group=group)
        if self.reads_positions:
            placement = place(self.intervention, call, group, self._home)
        return Context(placement, strength, call.n_rows, self._home)

    def context_outside(self, x: Tensor) -> Context:
        """The context of a layer that was called by itself, or recomputed in a way that cannot restore its context."""
        if self.reads_positions:
            raise RuntimeError(
                "positions: a steered layer ran outside its model's forward pass, so its tokens are unknown"
            )
        if not self._rowwise:
            return self._outside
        return Context(Placement(group=self._group), self._strength, None, self._home)


def steerings(
    intervention: Intervention, device: torch.device, strength: float | Tensor, group: Tensor | None
) -> list[Steering]:
    """One `Steering` per location of an intervention, in order; those of a `Composite` include its factors.

    Raises:
        TypeError, ValueError: as `patch`; also for an intervention that needs the activations of a source.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    for part in intervention.singles:
        if part.needs_source:
            raise TypeError(
                f"intervention: {type(part).__name__} needs the activations of a source, which af.patch gives"
            )
    made = []
    for factor, part in intervention.pairs:
        made.append(Steering(part, device, strength, group))
        made[-1].strength = factor * made[-1].strength
    return made


def one_strength(value: object, expected: str) -> float:
    """β as a float; TypeError or ValueError, with what was expected, where it is not one finite number."""
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
