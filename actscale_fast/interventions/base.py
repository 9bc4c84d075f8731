"""The base class of all interventions: fp32 parameters, a location, and a method that edits an activation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from .._files import write_bytes
from .._tables import Readable, ranges
from ..architectures.locate import locate
from ..architectures.location import Location, check_positions, check_site
from ..architectures.model_origin import ModelOrigin
from ..architectures.own_heads import OwnHeads
from . import saving
from .description import Description, read_description
from .placement import Placement

#: The most rows of the table that `print` shows.
_SHOWN = 10


class Intervention(Readable, nn.Module):
    """Parameters at a location of one model.

    To write your own, subclass it, name the parameters and their shapes in `parameter_tails` and implement `edit`;
    creation, stacking, checks, saving and patching are inherited. Parameters start at 0, where `edit` must change
    nothing. The class attributes below describe the edit to the rest of the package. An installed package can declare
    its classes as entry points of the group `actscale_fast.interventions` (`MyClass = "package.module:MyClass"`), so
    that `load_intervention` finds them.

    Args:
        location: site, layers, positions and the model's fingerprint.
        n_groups: G, the number of interventions stacked into one for row groups; None: a single one, without that axis.
        device: where the parameters are created; None: the CPU.
    """

    classes: ClassVar[dict[str, type[Intervention]]] = {}
    #: Whether parameters β·p at strength 1 do the same as parameters p at strength β.
    homogeneous: ClassVar[bool] = True
    #: Whether all positions of a location use the same parameters, P = 1.
    shares_positions: ClassVar[bool] = False
    #: Whether an edit multiplies activations by factors, which a norm without scale after the site would undo.
    multiplies: ClassVar[bool] = False
    #: Whether an edit takes stored activations for each row, of a second prompt. Such a class implements `interchange`
    #: and `check_source`, and `source_activations` unless these are those at its location; see `TakesSource`.
    needs_source: ClassVar[bool] = False
    #: Whether these are the activations of an unsteered run on the prompt itself.
    source_is_prompt: ClassVar[bool] = False
    #: Whether the `edit` of this class treats each head by itself and reads its parameters by `of_layer(...,
    #: placement.heads)`. Under tensor parallelism a process then edits its own heads; otherwise it is given all heads,
    #: which the processes exchange. A class that overrides `edit` says so anew.
    edits_own_heads: ClassVar[bool] = False
    #: The power of the activation's size that the parameters have in their units: 0 for factors, 1 for what is added to
    #: an activation, −1 for probes that are multiplied with one. It converts learning rates such as "5%".
    activation_power: ClassVar[int] = 0
    _wanted: Tensor

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:  # a saved intervention is never one of a base class
            Intervention.classes[cls.__name__] = cls

    def __init__(self, location: Location, *, n_groups: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.location = location
        self.n_groups = n_groups
        device = torch.device("cpu") if device is None else device  # not PyTorch's default device
        with torch.inference_mode(False):  # the parameters may be learned later
            for name, shape in self.parameter_shapes(location, n_groups).items():
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
        wanted = torch.tensor(location.positions or (), dtype=torch.int64, device=device)
        self.register_buffer("_wanted", wanted, persistent=False)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        site: str = "head",
        layers: Iterable[int] | None = None,
        positions: Iterable[int] | None = None,
        generated: bool = False,
        *,
        projection: str | None = None,
        layers_path: str | None = None,
        mlp: str | None = None,
    ) -> Self:
        """An intervention that does nothing yet, on the model's device.

        Args:
            model: a Hugging Face causal language model (or its base model).
            site: "head" (input of the attention's output projection, by query heads), "attn_out" (that projection's
                output), "mlp_out" (the MLP's output) or "residual" (the decoder layer's output). attn_out and mlp_out
                are taken before any norm or multiplier that follows: in Gemma 2, Gemma 3 and OLMo 2 such a norm undoes
                a positive factor, so that only the sign takes effect.
            layers: layer numbers, negative from the end; None: all layers.
            positions: None: every token, of the prompt and generated. A list: tokens of the prompt only, counted from
                its first real token, or from its last if negative; padding does not count. A position outside a prompt
                does nothing.
            generated: with a list, also steer the generated tokens, which share one further slot.
            projection, layers_path, mlp: module paths for a family that is not in the table, for example
                projection="self_attn.o_proj", layers_path="model.layers", mlp="mlp".

        Warns:
            UserWarning: scalars at a site followed by a norm without scale, where a positive factor changes nothing.

        Raises:
            TypeError, ValueError: an unknown site or layer, duplicates, a family whose modules cannot be identified, or
                a site that a short forward pass of the model shows to be something other than its name says.

        Example:
            >>> intervention = ActivScalar.for_model(model, site="head", layers=range(4, 20))
            >>> with patch(model, intervention, strength=-1.0):
            ...     model.generate(**inputs)
        """
        check_site(site)
        paths = {"projection": projection, "layers_path": layers_path, "mlp": mlp}
        location, device = locate(
            model,
            site,
            layers,
            check_positions(positions, generated),
            generated,
            {key: value for key, value in paths.items() if value is not None},
            scales=cls.multiplies,
        )
        return cls(location, device=device)

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter after its layer and position axes, [L, P, ...]."""
        raise NotImplementedError

    @classmethod
    def parameter_shapes(cls, location: Location, n_groups: int | None = None) -> dict[str, tuple[int, ...]]:
        """The full shape of each parameter: [L, P, ...], or [G, L, P, ...] where interventions are stacked."""
        n_slots = 1 if cls.shares_positions else location.n_slots
        lead = (() if n_groups is None else (n_groups,)) + (len(location.layers), n_slots)
        return {name: lead + tail for name, tail in cls.parameter_tails(location).items()}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        """The edited activation.

        Where all parameters are 0, it must equal x, and its derivative with respect to the parameters must be linear in
        β (or 0), so that rows of opposite strength can share forward passes in a fit.

        Args:
            x: [B, T, H, D] in the model's dtype (H = 1 at a whole site).
            layer: index among the chosen layers.
            strength: β, a float or one value per row [B].
            placement: which slot each token uses, and which group each row.
        """
        raise NotImplementedError

    @classmethod
    def takes_own_heads(cls) -> bool:
        """Whether the class that implements `edit` says that it `edits_own_heads`; a class derived from it may not."""
        owner = next(kind for kind in cls.__mro__ if "edit" in kind.__dict__)
        return bool(owner.__dict__.get("edits_own_heads", False))

    def full_step(self, sizes: Tensor) -> Tensor:
        """The change of an entry in each layer that changes the activation by its own size, a learning rate of 100%.

        Args:
            sizes: the root mean square of the activation in each layer, float32 [L].

        Returns:
            float32 [L], in the parameters' units.
        """
        return sizes**self.activation_power

    def source_activations(
        self, model: Any, tokenizer: Any, texts: Sequence[Any], *, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """Read from the frozen model what an edit takes from these texts, one item for each: [N, ...].

        A text may also be a list of chat messages. Implemented by classes with `needs_source` that take something else
        than the activations at their location; `actscale_fast.source_activations` reads for all classes.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no activations from other prompts")

    def interchange(self, source: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Let the passes inside the `with` block use these items of `source_activations`, one for each row.

        Implemented by classes with `needs_source`.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no activations from other prompts")

    def check_source(self, n_rows: int) -> None:
        """Raise a ValueError unless the source in use has n_rows items; implemented by classes with `needs_source`."""

    def of_layer(self, parameter: Tensor, layer: int, device: torch.device, heads: OwnHeads | None = None) -> Tensor:
        """One layer's values [G, P, ...], limited to its own heads; a view unless it is on another device.

        Args:
            parameter: of this intervention.
            layer: index among the chosen layers.
            device: where the values are needed.
            heads: `Placement.heads`: under tensor parallelism, only the heads of this process.
        """
        values = parameter.narrow(0, layer, 1) if self.n_groups is None else parameter.select(1, layer)
        n_heads = self.location.heads_of(layer)
        if values.dim() > 2 and values.shape[2] > n_heads:
            values = values.narrow(2, 0, n_heads)
        if values.device != device:
            values = values.to(device, non_blocking=True)
        return values if heads is None else heads.take(values, 2)

    @classmethod
    def stack(cls, interventions: Iterable[Intervention]) -> Self:
        """Several interventions of this class as one, [G, L, P, ...]; see `stack`."""
        from .composite import stack

        parts = list(interventions)
        if any(type(part) is not cls for part in parts):
            names = ", ".join(sorted({type(part).__name__ for part in parts}))
            raise ValueError(f"interventions: got {names}, expected {cls.__name__} alone")
        return cast(Self, stack(parts))

    def __add__(self, other: Intervention) -> Intervention:
        """Both interventions, this one first; two steering vectors at one site become one vector."""
        from .composite import Composite

        return Composite([(1.0, self), (1.0, other)])

    def __mul__(self, factor: float) -> Intervention:
        """The same intervention with its strength multiplied by a factor."""
        from .composite import scaled

        return scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> Intervention:
        return self * -1.0

    def __sub__(self, other: Intervention) -> Intervention:
        return self + -1.0 * other

    @property
    def pairs(self) -> list[tuple[float, Intervention]]:
        """(factor of the strength, intervention at a single location) of each part, in the order of application."""
        return [(1.0, self)]

    @property
    def singles(self) -> tuple[Intervention, ...]:
        """The parts, each at a single location."""
        return tuple(part for _, part in self.pairs)

    @property
    def paths(self) -> dict[str, str]:
        """Module paths that were given by name; empty where the family's own are meant."""
        return self.singles[0].location.paths

    @property
    def wanted_positions(self) -> Tensor:
        """The listed positions, int64 [P], on the parameters' device."""
        return self._wanted

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self._wanted.device

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        own = [self.location.heads_of(index) for index in range(len(self.location.layers))]
        most = max(own) * len(own)  # every layer has room for as many heads as the layer with the most
        return sum(parameter.numel() * sum(own) // most for parameter in self.parameters())

    @property
    def n_active(self) -> int:
        """How many parameters are not exactly zero."""
        return sum(int(torch.count_nonzero(parameter.detach())) for parameter in self.parameters())

    @property
    def l1(self) -> float:
        """The sum of the parameters' absolute values."""
        return sum(float(parameter.detach().abs().sum(dtype=torch.float64)) for parameter in self.parameters())

    def set_origin(self, origin: ModelOrigin) -> None:
        """Note which model the intervention is for; `save_pretrained` writes it into `intervention.json`."""
        for part in self.singles:
            part.location = replace(part.location, origin=origin)

    def check_finite(self) -> None:
        """Raise a ValueError that names a parameter with NaN or infinite values."""
        for name, parameter in self.named_parameters():
            bad = int((~torch.isfinite(parameter.detach())).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of {parameter.numel()} values are not finite")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the intervention into a folder: its tensors, then `intervention.json`, which commits them.

        An intervention already in the folder is replaced as a whole: a process killed at any moment leaves either the
        old one or the new one.

        Raises:
            ValueError: a parameter is not finite; nothing is written then.
            OSError: a file cannot be written; the message names it.
        """
        saving.save(self, Path(folder))

    def write_data(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Write all files except `intervention.json`; returns its fields and the names that it refers to."""
        encoded = saving.encode(type(self), self.location, self.n_groups, self.saved_tensors())
        write_bytes(folder / encoded.name, encoded.payload)
        return encoded.description, [encoded.name]

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors that `save_pretrained` writes."""
        return dict(self.named_parameters())

    @classmethod
    def saved_shapes(cls, location: Location, n_groups: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of `saved_tensors`."""
        return cls.parameter_shapes(location, n_groups)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set the values that `saved_tensors` returned."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.get_parameter(name).copy_(tensor)

    @classmethod
    def read(cls, description: Description) -> Self:
        """The intervention of this class that a folder's `intervention.json` describes."""
        location, n_groups = description.place()
        shapes = description.checked(lambda: cls.saved_shapes(location, n_groups))
        tensors = saving.load(description, shapes)

        intervention = description.checked(lambda: cls(location, n_groups=n_groups))
        description.checked(lambda: intervention.restore(tensors))
        description.checked(intervention.check_finite)
        return intervention

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote; see `load_intervention` for the errors."""
        loaded = load_intervention(folder)
        if not isinstance(loaded, cls):
            raise ValueError(f"{folder}: holds {type(loaded).__name__}, expected {cls.__name__}")
        return loaded

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the norms of the parameters at the places where the first one is largest."""
        names = list(self.parameter_tails(self.location))
        columns = ["group"] * (self.n_groups is not None) + ["layer"]
        columns += ["position"] * (self.location.positions is not None and not self.shares_positions)
        norms = []
        for name in names:
            values = self.get_parameter(name).detach()
            values = values if self.n_groups is not None else values[None]
            norms.append(values.flatten(3).norm(dim=-1).cpu().flatten())  # of [G, L, P]
        n_slots = 1 if self.shares_positions else self.location.n_slots
        slots = self.location.slots
        rows = []
        for flat in norms[0].argsort(descending=True, stable=True)[:_SHOWN].tolist():
            if not float(norms[0][flat]):
                break
            group, rest = divmod(flat, len(self.location.layers) * n_slots)
            layer, slot = divmod(rest, n_slots)
            place = {"group": group, "layer": self.location.layers[layer]}
            place["position"] = slots[slot] if "position" in columns else None
            rows.append([str(place[name]) for name in columns] + [f"{float(norm[flat]):.3g}" for norm in norms])
        return [*columns, *(f"‖{name}‖" for name in names)], rows

    def _heading(self) -> str:
        where = self.location
        tokens = where.tokens if where.positions is None else f"positions {where.tokens}"
        stacked = "" if self.n_groups is None else f" ({self.n_groups} stacked)"
        layers = f"layer{'s' * (len(where.layers) > 1)} {ranges(where.layers)}"
        return f"{type(self).__name__}{stacked} at {where.site_name} of {where.model.model_type}, {layers}, {tokens}"

    def _notes(self) -> list[str]:
        return [f"{self.n_active} of {self.n_parameters} parameters are active (not 0); their ℓ1 norm is {self.l1:.4g}"]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        where = self.location
        positions = "all" if where.positions is None else where.slots
        model = where.model.model_type
        return f"site={where.site_name!r}, layers={list(where.layers)}, positions={positions}, model={model!r}"


def load_intervention(folder: str | Path) -> Intervention:
    """Read an intervention of any class from a folder that `save_pretrained` wrote, onto the CPU.

    A class that is not imported yet is looked up by its name among the entry points of installed packages; see
    `Intervention`. A file never decides which module is imported.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file was changed, has an unknown class or format, leads out of the folder, has tensors of wrong
            shapes or types, or contains non-finite values; the message names the file.
        ImportError: an installed package declares the class, but its module cannot be imported.
        OSError: a file cannot be read; the message names it.
    """
    folder = Path(folder)
    for _ in range(4):
        description = read_description(folder)
        try:
            return read_part(description)
        except (FileNotFoundError, ValueError):
            if read_description(folder).sha256 == description.sha256:
                raise  # otherwise another process has replaced it in the meantime
    return read_part(read_description(folder))


def read_part(description: Description) -> Intervention:
    """The intervention that is described."""
    return description.class_in(Intervention.classes).read(description)
