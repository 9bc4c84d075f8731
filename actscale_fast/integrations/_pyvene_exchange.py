"""Conversion of interventions to pyvene and back, as objects and from the folders that pyvene saves.

Both directions mean all positions, as in pyvene with `unit_locations=None`: positions and heads that a call names are
not part of a pyvene model. An ActivScalar becomes one `ScaleIntervention` per layer, a SteerVec one
`AdditionIntervention` per layer.
"""

from __future__ import annotations

import functools
import operator
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyvene
import torch
from pyvene.models.constants import CONST_INPUT_HOOK
from pyvene.models.modeling_utils import get_module_hook
from torch import Tensor, nn

from .._json import LARGEST, parsed, read_limited
from ..architectures.layout import ModelLayout, layout
from ..architectures.location import SITES
from ..interventions import ActivScalar, Intervention, SteerVec
from ..patching.edits import one_strength
from ._pyvene_kinds import KINDS, SIGNS, ScaleIntervention, added_vector, unknown_kind

#: pyvene's names for the sites, used where they mean the same module.
_COMPONENTS = {
    ("head", ActivScalar): "head_attention_value_output",
    ("head", SteerVec): "attention_value_output",
    ("mlp_out", ActivScalar): "mlp_output",
    ("mlp_out", SteerVec): "mlp_output",
    ("residual", ActivScalar): "block_output",
    ("residual", SteerVec): "block_output",
}


class _Part(NamedTuple):
    """One pyvene intervention."""

    key: str
    representation: Any
    kind: type
    tensors: dict[str, Tensor]
    n_dims: int | None


def to_pyvene(intervention: Intervention, model: nn.Module, strength: float = 1.0) -> Any:
    """An IntervenableModel that computes the same as `af.patch(model, intervention, strength)`.

    Call it with `unit_locations=None`; pass `intervene_on_prompt=True` to its `generate` as well, which then steers the
    prompt and the generated tokens. pyvene freezes the model's weights and sets it to evaluation mode.

    Args:
        intervention: an ActivScalar, a SteerVec or a composite of these, at all positions, not stacked; it is copied.
        model: the Hugging Face model that it was made for, or another of the same type and shape.
        strength: β, multiplied into the parameters.

    Raises:
        TypeError, ValueError: an intervention of another class, with positions or stacked.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    found, strength = layout(model, intervention.paths), one_strength(strength, "a float")
    representations = []
    for factor, part in intervention.pairs:
        _check_part(part)
        part.location.model.require(found.fingerprint)
        own = layout(model, part.paths)
        for index, layer in enumerate(part.location.layers):
            representations.append(_representation(own, part, index, layer, strength * factor))
    return pyvene.IntervenableModel(representations, model=found.model)


def from_pyvene(intervenable: Any) -> Intervention:
    """A copy of what an IntervenableModel does with `unit_locations=None`, as an intervention on its model.

    Raises:
        TypeError: not an IntervenableModel.
        ValueError: an intervention other than multiplication by one scalar per head, zeroing, or addition of a constant
            vector; a component that is not a site; factors for fewer heads than the site has, or zeroing of heads that
            each call names; linked interventions.
    """
    if not isinstance(intervenable, pyvene.IntervenableModel):
        raise TypeError(f"intervenable: got {type(intervenable).__name__}, expected a pyvene.IntervenableModel")
    parts = []
    for key in intervenable.sorted_keys:
        item = intervenable.interventions[key]
        n_dims = getattr(item, "interchange_dim", None)
        tensors = {name: value.detach() for name, value in item.state_dict().items()}
        n_dims = None if n_dims is None else int(n_dims)
        parts.append(_Part(key, intervenable.representations[key], type(item), tensors, n_dims))
    return _assembled(parts, layout(intervenable.model))


def load_pyvene(folder: str | Path, model: nn.Module) -> Intervention:
    """The intervention in a folder that `IntervenableModel.save` wrote; only tensors are read, and no code is run.

    Raises:
        FileNotFoundError: `config.json` or a tensor file is missing.
        ValueError: a file is damaged, or an intervention is not one that `from_pyvene` supports.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a folder written by pyvene's IntervenableModel.save")
    try:
        config = parsed(read_limited(path, LARGEST), finite=False)
        representations = [pyvene.RepresentationConfig(*options) for options in config["representations"]]
        described = list(
            zip(representations, config["intervention_types"], config["intervention_dimensions"], strict=True)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or not a pyvene config ({error})") from None
    names, parts = {str(kind): kind for kind in KINDS}, []
    counter = SimpleNamespace(_key_collision_counter={})
    for representation, name, n_dims in described:
        key = pyvene.IntervenableModel._get_representation_key(counter, representation)
        if name not in names:
            raise ValueError(f"{path}: {key} is {name}, expected one of {', '.join(names)}")
        tensors = {} if names[name] is pyvene.ZeroIntervention else _read_tensors(folder / f"intkey_{key}.bin")
        parts.append(_Part(key, representation, names[name], tensors, n_dims))
    return _assembled(parts, layout(model))


def _check_part(part: Intervention) -> None:
    if type(part) not in (ActivScalar, SteerVec):
        raise TypeError(f"intervention: got {type(part).__name__}, expected ActivScalar or SteerVec")
    if part.location.positions is not None:
        raise ValueError("intervention: has positions, expected all; in pyvene every call names them (unit_locations=)")
    if part.n_groups is not None:
        raise ValueError("intervention: is a stack, which pyvene does not support; pass one of its parts")


def _representation(found: ModelLayout, part: Intervention, index: int, layer: int, strength: float) -> dict[str, Any]:
    """One entry of a pyvene config."""
    location = part.location
    item: Any
    if isinstance(part, ActivScalar):
        item = ScaleIntervention(unit="h" if location.site == "head" else "pos", max_number_of_units=location.n_heads)
        with torch.no_grad():
            item.alpha.copy_(strength * part.alpha[index, 0])
        item = item.to(part.device)
    else:
        vector = strength * part.get_parameter("vectors")[index, 0].detach().flatten()
        item = pyvene.AdditionIntervention(embed_dim=len(vector), source_representation=vector)
    by_head = location.site == "head" and isinstance(part, ActivScalar)
    return {
        "layer": layer, "component": _component(found, location.site, type(part), layer), "intervention": item,
        "unit": "h" if by_head else "pos", "max_number_of_units": location.n_heads if by_head else 1,
    }  # fmt: skip


def _component(found: ModelLayout, site: str, kind: type[Intervention], layer: int) -> str:
    """pyvene's name for the site, or the module's path if pyvene has no name or means another module."""
    module = found.site_module(site, layer)
    name = _COMPONENTS.get((site, kind), "")
    if name in pyvene.type_to_module_mapping.get(type(found.model), {}):
        hook = get_module_hook(found.model, pyvene.RepresentationConfig(layer, name))
        if hook.__self__ is module and (hook.__name__ == CONST_INPUT_HOOK) == (site == "head"):
            return name
    path = next(path for path, other in found.model.named_modules() if other is module)
    return f"{path}.{'input' if site == 'head' else 'output'}"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected it beside config.json")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, or more than tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: holds no named tensors")
    return tensors


def _assembled(parts: list[_Part], found: ModelLayout) -> Intervention:
    """The parts as few interventions, in the order of execution at each site."""
    for part in parts:
        if part.representation.intervention_link_key is not None:
            raise ValueError(f"{part.key}: is linked (intervention_link_key), expected one that is not")
    sites = dict(_sites(found))
    places = [_place(part, found, sites) for part in parts]
    groups: list[tuple[str, type[Intervention], dict[int, Tensor]]] = []
    for (site, layer, _), part in sorted(zip(places, parts, strict=True), key=lambda pair: pair[0].is_later):
        kind, values = _parameters(part, found, site)
        chosen: dict[int, Tensor] | None = None
        for other_site, other_kind, layers in reversed(groups):
            if other_site == site and layer in layers:
                break
            if (other_site, other_kind) == (site, kind):
                chosen = layers
        if chosen is None:
            chosen = {}
            groups.append((site, kind, chosen))
        chosen[layer] = values
    if not groups:
        raise ValueError("intervenable: has no intervention, expected at least one")
    made = []
    for site, kind, layers in groups:
        location = found.location(site, sorted(layers))
        one = kind(location, device=next(iter(layers.values())).device)
        (parameter,) = one.parameters()
        with torch.no_grad():
            parameter.copy_(torch.stack([layers[layer] for layer in location.layers]).view_as(parameter))
        made.append(one)
    return functools.reduce(operator.add, made)


class _Place(NamedTuple):
    """Where an intervention acts."""

    site: str
    layer: int
    is_later: bool  # at another module, which runs after the site's own in any order of the config


def _sites(found: ModelLayout) -> Iterator[tuple[tuple[int, bool], _Place]]:
    """(module, whether its input) -> place."""
    for layer, block in enumerate(found.layers):
        for site in SITES:
            if site == "mlp_out" and not found.mlp:
                continue
            yield (id(found.site_module(site, layer)), site == "head"), _Place(site, layer, False)
        if layer:
            yield (id(block), True), _Place("residual", layer - 1, True)


def _place(part: _Part, found: ModelLayout, sites: dict[tuple[int, bool], _Place]) -> _Place:
    component, layer = part.representation.component, part.representation.layer
    try:
        hook = get_module_hook(found.model, part.representation)
    except (AttributeError, IndexError, NameError, TypeError, ValueError) as error:  # pyvene does not check
        raise ValueError(f"{part.key}: the model has no component {component!r} of layer {layer} ({error})") from None
    place = sites.get((id(hook.__self__), hook.__name__ == CONST_INPUT_HOOK))
    if place is None and component == "attention_output":
        # The attention module returns the output of its projection.
        place = _Place("attn_out", layer % found.n_layers, True)
    if place is None:
        raise ValueError(f"{part.key}: component {component!r} is none of the sites {', '.join(SITES)}")
    return place


def _parameters(part: _Part, found: ModelLayout, site: str) -> tuple[type[Intervention], Tensor]:
    """The class, and its flat parameters at one layer."""
    if unknown_kind(part.kind):
        raise ValueError(f"{part.key}: {unknown_kind(part.kind)}")
    n_heads = found.n_heads if site == "head" else 1
    width = n_heads * found.head_dim if site == "head" else found.hidden_size
    if part.kind in SIGNS:
        source = part.tensors.get("source_representation")
        if source is None:
            raise ValueError(f"{part.key}: its source comes with each call, expected a constant one")
        if source.numel() != width:
            raise ValueError(f"{part.key}: its source has {source.numel()} numbers, expected {width}")
        return SteerVec, added_vector(part.kind, source, part.n_dims)
    by_head = str(part.representation.unit).startswith("h")
    if part.kind is pyvene.ZeroIntervention:
        if by_head:
            raise ValueError(f"{part.key}: zeroes heads that each call names, expected a whole site (unit 'pos')")
        _check_dims(part, "zeroes", width)
        return ActivScalar, torch.full((n_heads,), -1.0, dtype=torch.float32, device="cpu")
    alpha = part.tensors.get("alpha")
    if alpha is None:
        raise ValueError(f"{part.key}: has no factors (alpha)")
    _check_dims(part, "scales", width // n_heads if by_head else width)
    if by_head and alpha.numel() != n_heads:
        raise ValueError(
            f"{part.key}: scales {alpha.numel()} heads that each call names, expected all {n_heads} of the site {site}"
        )
    if not by_head and alpha.numel() != 1:
        raise ValueError(f"{part.key}: has {alpha.numel()} factors, expected one for the whole site (unit 'pos')")
    return ActivScalar, alpha.float().expand(n_heads)


def _check_dims(part: _Part, does: str, width: int) -> None:
    if part.n_dims is not None and part.n_dims < width:
        raise ValueError(f"{part.key}: {does} {part.n_dims} of {width} dimensions, expected all of them")
