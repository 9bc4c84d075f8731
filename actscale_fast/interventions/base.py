"""What every intervention is: a module of fp32 parameters, a location, and one method that edits an activation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from .._files import write_bytes
from ..architectures.locate import locate
from ..architectures.location import Location, check_positions, check_site
from . import saving
from .positions import Placement


class Intervention(nn.Module):
    """Parameters at a location of one model.

    A subclass names its parameters and their shapes after [L, P] in `parameter_tails` and implements `edit`; creation,
    stacking, checks, saving and patching come with it. Parameters start at 0, the identity.

    Args:
        location: site, layers, positions and the model's fingerprint.
        n_groups: G, the number of interventions stacked into one for row groups; None: a single one, without that axis.
    """

    classes: ClassVar[dict[str, type[Intervention]]] = {}
    #: Whether parameters β·p under strength 1 do what parameters p do under strength β.
    homogeneous: ClassVar[bool] = True
    #: Whether all positions of a location use the same parameters, P = 1.
    shares_positions: ClassVar[bool] = False
    #: Whether an edit multiplies an activation by factors, which a norm without scale after the site undoes.
    multiplies: ClassVar[bool] = False
    #: Whether an edit needs the activations of a second prompt for each row.
    needs_source: ClassVar[bool] = False
    _wanted: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Intervention.classes[cls.__name__] = cls

    def __init__(self, location: Location, *, n_groups: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.location = location
        self.n_groups = n_groups
        device = torch.device("cpu") if device is None else device  # not PyTorch's default, which is the caller's
        with torch.inference_mode(False):  # they are learned later
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
                a positive factor, and only its sign gets through.
            layers: numbers of the layers, negative from the end; None: all.
            positions: None: every token, prompt and generated. A list: tokens of the prompt only, counted from its
                first real token, negative from its last; padding never counts. One outside a prompt does nothing.
            generated: with a list, steer the generated tokens too; they share one further slot.
            projection, layers_path, mlp: module paths for a family that is not in the table, e.g.
                projection="self_attn.o_proj", layers_path="model.layers", mlp="mlp".

        Warns:
            UserWarning: scalars at a site that a norm without scale follows, where a positive factor changes nothing.

        Raises:
            TypeError, ValueError: an unknown site or layer, duplicates, a family whose parts cannot be told apart, or a
                site that a short forward pass of the model shows to be something else than its name says.

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

        Where all parameters are 0 it is x itself, and its derivative by the parameters is linear in β (or 0): rows of
        opposite strength then share their passes in a fit.

        Args:
            x: [B, T, H, D] in the model's dtype (H = 1 at a whole site).
            layer: index among the chosen layers.
            strength: β, a float or one per row [B].
            placement: which slot each token uses and which group each row.
        """
        raise NotImplementedError

    def check_source(self, n_rows: int) -> None:
        """Refuse sources that are not one for each of n_rows; of a class that needs them."""

    def of_layer(self, parameter: Tensor, layer: int, device: torch.device) -> Tensor:
        """One layer's values [G, P, ...] as a view, of its own heads; copied only where it is on another device."""
        values = parameter.narrow(0, layer, 1) if self.n_groups is None else parameter.select(1, layer)
        n_heads = self.location.heads_of(layer)
        if values.dim() > 2 and values.shape[2] > n_heads:
            values = values.narrow(2, 0, n_heads)
        return values if values.device == device else values.to(device, non_blocking=True)

    @classmethod
    def stack(cls, interventions: Iterable[Intervention]) -> Self:
        """Several interventions of this class as one, [G, L, P, ...]; see `interventions.stack`."""
        from .composite import stack

        parts = list(interventions)
        if any(type(part) is not cls for part in parts):
            names = ", ".join(sorted({type(part).__name__ for part in parts}))
            raise ValueError(f"interventions: got {names}, expected {cls.__name__} alone")
        return cast(Self, stack(parts))

    def __add__(self, other: Intervention) -> Intervention:
        """Both, this one first; steering vectors at one site and its positions become one vector."""
        from .composite import added

        return added(self, other)

    def __mul__(self, factor: float) -> Intervention:
        """The same under β·factor."""
        from .composite import scaled

        return scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> Intervention:
        return self * -1.0

    def __sub__(self, other: Intervention) -> Intervention:
        return self + -1.0 * other

    @property
    def pairs(self) -> list[tuple[float, Intervention]]:
        """(factor of the strength, intervention of one place) of each that this one is made of, as they are applied."""
        return [(1.0, self)]

    @property
    def singles(self) -> tuple[Intervention, ...]:
        """The interventions of one place each that this one is made of."""
        return tuple(part for _, part in self.pairs)

    @property
    def paths(self) -> dict[str, str]:
        """Module paths of a model of an unlisted family."""
        return self.singles[0].location.paths

    @property
    def wanted_positions(self) -> Tensor:
        """int64 [P], the listed positions, on the parameters' device."""
        return self._wanted

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self._wanted.device

    @property
    def n_parameters(self) -> int:
        """How many numbers are learned."""
        own = [self.location.heads_of(index) for index in range(len(self.location.layers))]
        most = max(own) * len(own)  # parameters have room for the heads of the layer that has the most
        return sum(parameter.numel() * sum(own) // most for parameter in self.parameters())

    @property
    def n_active(self) -> int:
        """How many of them are not exactly zero."""
        return sum(int(torch.count_nonzero(parameter.detach())) for parameter in self.parameters())

    @property
    def l1(self) -> float:
        """The sum of their absolute values."""
        return sum(float(parameter.detach().abs().sum(dtype=torch.float64)) for parameter in self.parameters())

    def check_finite(self) -> None:
        """Raise a ValueError that names a parameter which holds NaN or infinity, and how many."""
        for name, parameter in self.named_parameters():
            bad = int((~torch.isfinite(parameter.detach())).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of {parameter.numel()} values are not finite")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the intervention into `folder`: its tensors, then `intervention.json`, which commits them.

        An intervention that the folder holds is replaced as a whole: a process that is killed at any moment leaves the
        older one or the new one.

        Raises:
            ValueError: a parameter is not finite. Nothing is written then.
            OSError: a file cannot be written; the message names it.
        """
        saving.save(self, Path(folder))

    def write_data(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Write all files but `intervention.json`; returns its fields and the names it refers to."""
        encoded = saving.encode(self)
        write_bytes(folder / encoded.name, encoded.payload)
        return encoded.description, [encoded.name]

    def saved_tensors(self) -> dict[str, Tensor]:
        """What `save_pretrained` writes."""
        return dict(self.named_parameters())

    @classmethod
    def saved_shapes(cls, location: Location, n_groups: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of `saved_tensors`."""
        return cls.parameter_shapes(location, n_groups)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `saved_tensors` gave."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.get_parameter(name).copy_(tensor)

    @classmethod
    def read(cls, description: saving.Description) -> Self:
        """The intervention in a folder whose `intervention.json` says that it is of this class."""
        location, n_groups = saving.place(description)
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

    def extra_repr(self) -> str:
        where = self.location
        positions = (
            "all" if where.positions is None else [*where.positions, *(["generated"] if where.generated else [])]
        )
        return (
            f"site={where.site!r}, layers={list(where.layers)}, positions={positions}, model={where.model.model_type!r}"
        )


def load_intervention(folder: str | Path) -> Intervention:
    """Read an intervention of any class from the folder that `save_pretrained` wrote, onto the CPU.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file was changed, is of an unknown class or format, leads out of the folder, has tensors of wrong
            shapes or types, or holds non-finite values; the message names the file.
        OSError: a file cannot be read; the message names it.
    """
    folder = Path(folder)
    for _ in range(4):
        description = saving.read_description(folder)
        try:
            return read_part(description)
        except (FileNotFoundError, ValueError):
            if saving.read_description(folder).sha256 == description.sha256:
                raise  # otherwise another process has saved over it meanwhile
    return read_part(saving.read_description(folder))


def read_part(description: saving.Description) -> Intervention:
    """The intervention that is described."""
    return saving.class_of(description, Intervention.classes).read(description)
