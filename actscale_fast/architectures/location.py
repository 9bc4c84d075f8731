"""Where an intervention acts, in words: site, layers, positions, and the fingerprint of the model it belongs to."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from .._json import shown
from .._suggestions import closest, did_you_mean
from .model_origin import ModelOrigin

Site = Literal["head", "attn_out", "mlp_out", "residual"]
SITES: tuple[str, ...] = get_args(Site)


@dataclass(frozen=True)
class ModelFingerprint:
    """What two models must share for one's intervention to make sense in the other."""

    model_type: str
    n_layers: int
    n_heads: int
    head_dim: int
    hidden_size: int

    def require(self, found: ModelFingerprint) -> None:
        """Raise a ValueError that names every difference between this (the intervention's) and `found` (a model's)."""
        differences = [
            f"{item.name} {getattr(self, item.name)!r} (the model has {getattr(found, item.name)!r})"
            for item in fields(self)
            if getattr(self, item.name) != getattr(found, item.name)
        ]
        if differences:
            raise ValueError(f"intervention: made for another model: {', '.join(differences)}")


@dataclass(frozen=True)
class Location:
    """Site, layers and positions of an intervention, already checked; `paths` are modules named by the caller."""

    site: str
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    generated: bool
    model: ModelFingerprint
    paths: dict[str, str] = field(default_factory=dict)
    #: (heads, their width) of the layers that differ from the model's n_heads and head_dim, by the layer's number.
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: The model that the intervention was made for; two locations are equal whatever it is. None: it is not known.
    origin: ModelOrigin | None = field(default=None, compare=False, repr=False)

    @property
    def n_heads(self) -> int:
        """H: the heads at the head site, of the chosen layer that has the most; 1 at a whole site."""
        return max(self.heads_of(index) for index in range(len(self.layers)))

    @property
    def named_module(self) -> str | None:
        """The path, from a layer, of the module that was named as the site; None: the family's own."""
        return None if self.site == "residual" else self.paths.get("mlp" if self.site == "mlp_out" else "projection")

    @property
    def module_key(self) -> tuple[object, ...]:
        """What tells the edited modules of two locations in one model apart, but for their layers."""
        return self.site, tuple(sorted(self.paths.items()))

    @property
    def site_name(self) -> str:
        """The site, in words, with the module that was named as it."""
        return self.site if self.named_module is None else f"{self.site} ({self.named_module})"

    def heads_of(self, index: int) -> int:
        """The heads of one layer (its index among the chosen ones); 1 at a whole site."""
        return self.sizes_of(index)[0]

    def sizes_of(self, index: int) -> tuple[int, int]:
        """(heads, their width) of one layer (its index among the chosen ones); (1, hidden size) at a whole site."""
        if self.site != "head":
            return 1, self.model.hidden_size
        return self.heads.get(self.layers[index], (self.model.n_heads, self.model.head_dim))

    @property
    def width(self) -> int:
        """D: the length of the vectors that are edited.

        Raises:
            ValueError: the heads of the chosen layers have several widths.
        """
        if self.site != "head":
            return self.model.hidden_size
        widths = {self.heads.get(layer, (0, self.model.head_dim))[1] for layer in self.layers}
        if len(widths) > 1:
            raise ValueError(
                f"layers: their heads are {' and '.join(map(str, sorted(widths)))} wide, expected one width; make one "
                "intervention for the layers of each width and add them"
            )
        return widths.pop()

    @property
    def n_slots(self) -> int:
        """P: one for every token alike, or one a listed position, and one more for the generated tokens."""
        return 1 if self.positions is None else len(self.positions) + self.generated

    @property
    def slots(self) -> list[int | str]:
        """The name of each slot, a position or "generated"; there are none where every token is alike."""
        return [*(self.positions or ()), *(["generated"] * self.generated)]

    @property
    def tokens(self) -> str:
        """The edited tokens in words: "every token" or "0, -1, generated"."""
        return "every token" if self.positions is None else ", ".join(map(str, self.slots))

    def first_changed(self, layer: int) -> int:
        """The lowest layer whose computation an edit at `layer` changes: the site residual is that layer's output."""
        return layer + (self.site == "residual")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON; without the origin."""
        data = asdict(self)
        del data["origin"]
        if not data["heads"]:
            del data["heads"]
        else:
            data["heads"] = {str(layer): list(sizes) for layer, sizes in data["heads"].items()}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Location:
        """The inverse of `to_dict`, for untrusted data.

        Raises:
            ValueError: a field is missing, unknown, of a wrong type or invalid.
        """
        _check_keys("location", data, cls)
        _check_keys("model", data["model"], ModelFingerprint)
        model = ModelFingerprint(**data["model"])
        numbers = [getattr(model, item.name) for item in fields(model)[1:]]
        if not isinstance(model.model_type, str) or not all(_is_size(value) for value in numbers):
            raise ValueError(f"model: got {shown(data['model'])}, expected a name and positive integers")
        layers, positions, paths = data["layers"], data["positions"], data["paths"]
        if not isinstance(layers, list) or len(layers) > model.n_layers:
            raise ValueError(f"layers: got {shown(layers)}, expected a list of at most {model.n_layers}")
        if positions is not None and not isinstance(positions, list):
            raise ValueError(f"positions: got {shown(positions)}, expected null or a list")
        if not all(type(position) is int and abs(position) < _LARGEST for position in positions or ()):
            raise ValueError(f"positions: got {shown(positions)}, expected integers of tokens")
        if type(data["generated"]) is not bool:
            raise ValueError(f"generated: got {shown(data['generated'])}, expected true or false")
        if not isinstance(paths, dict) or not all(isinstance(value, str) for value in paths.values()):
            raise ValueError(f"paths: got {shown(paths)}, expected names of modules")
        try:
            return cls(
                site=check_site(data["site"]),
                layers=check_layers(layers, model.n_layers),
                positions=check_positions(positions, data["generated"]),
                generated=data["generated"],
                model=model,
                paths=dict(paths),
                heads=_heads_from(data.get("heads", {}), model.n_layers),
            )
        except TypeError as error:
            raise ValueError(str(error)[:300]) from None


def _heads_from(data: Any, n_layers: int) -> dict[int, tuple[int, int]]:
    if not isinstance(data, dict) or len(data) > n_layers:
        raise ValueError(f"heads: got {shown(data)}, expected an object of layers")
    found = {}
    for layer, sizes in data.items():
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(_is_size(size) for size in sizes):
            raise ValueError(f"heads: got {shown(sizes)}, expected [heads, width]")
        if not (layer.isascii() and layer.isdigit() and len(layer) < 9 and int(layer) < n_layers):
            raise ValueError(f"heads: got the layer {shown(layer)}, expected 0 to {n_layers - 1}")
        found[int(layer)] = (sizes[0], sizes[1])
    return found


#: More layers, heads, channels or tokens than any model has.
_LARGEST = 1 << 24


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _check_keys(name: str, data: Any, cls: type[Any]) -> None:
    """Raise a ValueError unless JSON data has the fields of a dataclass; those with a default may be missing."""
    if not isinstance(data, dict):
        raise ValueError(f"{name}: got {shown(data)}, expected an object")
    known = {item.name for item in fields(cls) if item.compare}
    needed = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
    needed |= {"paths"} & known
    if missing := needed - data.keys():
        raise ValueError(f"{name}: {', '.join(sorted(missing))} missing")
    if unknown := data.keys() - known:
        raise ValueError(f"{name}: got the unknown {shown(sorted(unknown))}")


def check_site(site: object) -> str:
    """`site` where it is one of the four."""
    if not isinstance(site, str) or site not in SITES:
        raise ValueError(f"site: got {site!r}, expected one of {', '.join(SITES)}{did_you_mean(site, SITES)}")
    return site


def check_layers(layers: object, n_layers: int) -> tuple[int, ...]:
    """The chosen layers, in the caller's order, as numbers from 0; None is all of them."""
    if layers is None:
        return tuple(range(n_layers))
    chosen = []
    for layer in _integers("layers", layers):
        if not -n_layers <= layer < n_layers:
            raise ValueError(f"layers: got {layer}, expected {-n_layers} to {n_layers - 1}: the model has {n_layers}")
        chosen.append(layer % n_layers)
    if not chosen:
        raise ValueError("layers: got none, expected at least one (or None for all)")
    _refuse_duplicates("layers", chosen)
    return tuple(chosen)


#: What a reader may call some positions, and how they are written.
_SPOKEN = {
    "last": "positions=[-1]",
    "first": "positions=[0]",
    "all": "positions=None",
    "every": "positions=None",
    "prompt": "a list of positions, which are tokens of the prompt",
    "generated": "positions=[…] with generated=True",
}


def check_positions(positions: object, generated: bool) -> tuple[int, ...] | None:
    """The positions as a tuple; None is every token, which leaves nothing for `generated` to add."""
    if positions is None:
        if generated:
            raise ValueError("generated: got True with positions=None, which steers the generated tokens already")
        return None
    if isinstance(positions, str) and (meant := closest(positions, _SPOKEN)) is not None:
        raise TypeError(
            f"positions: got {positions!r}, expected None or an iterable of ints; did you mean {_SPOKEN[meant]}?"
        )
    chosen = _integers("positions", positions)
    if not chosen and not generated:
        raise ValueError("positions: got none, expected at least one (or None for every token)")
    _refuse_duplicates("positions", chosen)
    return tuple(chosen)


def _integers(name: str, values: object) -> list[int]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: got {values!r}, expected None or an iterable of ints")
    numbers = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            numbers.append(operator.index(value))
        except TypeError:
            raise TypeError(f"{name}: got {value!r} among them, expected ints") from None
    return numbers


def _refuse_duplicates(name: str, values: list[int]) -> None:
    twice = sorted(value for value, count in Counter(values).items() if count > 1)
    if twice:
        raise ValueError(f"{name}: got {_listed(twice)} more than once")


def _listed(values: list[int], most: int = 10) -> str:
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
