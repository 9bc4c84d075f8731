"""An intervention under a strength, ready for any forward pass: its edits and the contexts that they read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..interventions import Intervention, Placement
from ..interventions.positions import EVERYWHERE
from ..modules.module_paths import Links
from . import forward_context as contexts
from .forward_call import Call
from .token_slots import per_row, place, refuse_separate_rows


class Edit:
    """One layer's edit: reads the context of the running forward pass and hands the activation to the intervention."""

    def __init__(self, steering: Steering, layer: int) -> None:
        self.steering = steering
        self.intervention = steering.intervention
        self.layer = layer
        self.number = steering.intervention.location.layers[layer]  # in the model
        self.whole = steering.intervention.location.site != "head"
        self.n_heads, self.width = steering.intervention.location.sizes_of(layer)

    def __call__(self, x: Tensor) -> Tensor:
        context = self.steering.context or self.steering.outside(x)
        if context.device is not None:
            context = context.on(x.device)
        if context.placement is None:
            return x
        if x.dim() == 2:  # OPT flattens rows and tokens
            return self(x.unflatten(0, (context.n_rows or 1, -1))).flatten(0, 1)
        context.use(self.number)
        placement = context.placement
        index = placement.index
        if index is not None and x.shape[1] != index.shape[1]:
            if (
                x.shape[1] == context.n_last
            ):  # the only tokens whose logits are wanted (layers that share keys: Gemma 4)
                placement = placement.last(x.shape[1])
                return self._edited(x, context, placement)
            raise RuntimeError(
                f"positions: a layer got {x.shape[1]} tokens, but the model was given {index.shape[1]}: it adds tokens "
                "of its own, so that positions cannot be told"
            )
        return self._edited(x, context, placement)

    def _edited(self, x: Tensor, context: contexts.Context, placement: Placement) -> Tensor:
        edit = self.intervention.edit
        if self.whole:
            return edit(x.unsqueeze(2), self.layer, context.strength, placement).squeeze(2)
        heads = apart(x, self.n_heads, self.width)
        return edit(heads, self.layer, context.strength, placement).flatten(2)


def apart(x: Tensor, n_heads: int, width: int) -> Tensor:
    """x [B, T, H·D] as heads [B, T, H, D].

    Raises:
        RuntimeError: another number of channels, such as those of one rank of a tensor-parallel model.
    """
    if x.shape[-1] != n_heads * width:
        raise RuntimeError(
            f"site: 'head' got {x.shape[-1]} channels, expected {n_heads} heads · {width} = {n_heads * width}; does "
            "each process hold only some of the heads (tensor parallelism)?"
        )
    return x.unflatten(-1, (n_heads, width))


class Steering:
    """An intervention of one place with its strength and groups; attached to nothing.

    Whoever calls its edits sets `context` to what `enter` gave for the forward pass.

    Args:
        intervention: moved to the device if it is elsewhere.
        device: where the edited layers compute; None: not known, the intervention stays where it is.
        strength, group: as `applying.patch` takes them.
    """

    def __init__(
        self, intervention: Intervention, device: torch.device | None, strength: float | Tensor, group: Tensor | None
    ) -> None:
        intervention.check_finite()
        self.intervention = intervention
        self.context: contexts.Context | None = None
        self.links = Links(intervention)
        self.counted: tuple[int, ...] | None = None
        #: While True, a forward pass edits nothing.
        self.paused = False
        self._home = device or intervention.device
        self._group = _checked_group(group, intervention.n_groups, self._home)
        self._plain = contexts.Context(EVERYWHERE, 1.0)
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
    def reads_calls(self) -> bool:
        """Whether what it does depends on the arguments of the forward pass: on rows, or on where tokens stand."""
        return self._rowwise or self.intervention.location.positions is not None

    @property
    def _rowwise(self) -> bool:
        return isinstance(self._strength, Tensor) or self._group is not None

    @property
    def places_tokens(self) -> bool:
        """Whether it must know where each token stands in its prompt."""
        return self.intervention.location.positions is not None

    def edits(self) -> Iterator[tuple[int, Edit]]:
        """(number of the layer, its edit): a function of the activation [B, T, H·D] or [B, T, d]."""
        for index, layer in enumerate(self.intervention.location.layers):
            yield layer, Edit(self, index)

    def enter(self, call: Call) -> contexts.Context:
        """The context of one forward pass."""
        location = self.intervention.location
        if self.paused:
            return contexts.Context(None, 0.0)
        if self.intervention.needs_source and call.prompt is None:  # generate() repeats a prompt's row for its beams
            self.intervention.check_source(call.n_rows)
        if not self.reads_calls:
            return contexts.Context(EVERYWHERE, self._strength, call.n_rows)
        if call.packed:
            raise ValueError(
                "positions, strength, group: packed sequences have no rows to place them by; pad the batch"
            )
        if self._rowwise:
            refuse_separate_rows("strength, group", call)
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


def steerings(
    intervention: Intervention, device: torch.device, strength: float | Tensor, group: Tensor | None
) -> list[Steering]:
    """One for each place of an intervention, in order, for a caller of their edits; a `Composite`'s carry its factors.

    Raises:
        TypeError, ValueError: as `applying.patch`; also an intervention that needs the activations of a source.
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
