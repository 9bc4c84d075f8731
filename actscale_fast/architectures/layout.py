"""`layout(model)`: what this package knows of a model, whatever its family calls the parts: layers, sites and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from .._versions import require_supported
from .detect import HELP, find_layers, find_mlp, find_projection
from .families import FAMILIES
from .heads import ConfigHeads, heads_of
from .hugging_face import text_config, unwrap
from .location import Location, ModelFingerprint, check_layers
from .model_origin import origin_of
from .parts import config_value, has, part, positive_int, submodule, takes_hidden_states
from .sharding import refuse_parts, refuse_wrapper


class _AtSite(NamedTuple):
    """What stands at a site."""

    modules: dict[int, nn.Module]  # by layer
    layers: dict[int, list[int]]  # the layers that have the site, by the identity of the module


@dataclass(frozen=True)
class ModelLayout:
    """The parts and sizes of a causal language model."""

    model: nn.Module
    decoder: nn.Module  # the module that owns the layers; takes input_ids or inputs_embeds, and attention_mask
    layers: tuple[nn.Module, ...]
    layers_path: str  # from the model to the list of layers
    projection: str  # from a layer to the attention's output projection
    mlp: str  # from a layer to the module whose output is the MLP's
    #: (heads, their width) of each layer's attention; None: the layer has none.
    heads: tuple[tuple[int, int] | None, ...]
    hidden_size: int
    max_context: int | None  # tokens; None: the config sets no limit
    model_type: str
    n_heads: int  # of most layers that have heads
    head_dim: int  # of most layers that have heads
    uncertain: ValueError | None = None  # why no projection was found
    paths: dict[str, str] = field(default_factory=dict)  # those that the caller named
    _at_site: dict[str, _AtSite] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the config names."""
        return _size(text_config(self.model), "vocab_size") or 1

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What a saved intervention keeps of the model."""
        return ModelFingerprint(self.model_type, self.n_layers, self.n_heads, self.head_dim, self.hidden_size)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The attention's output projection of every layer that has heads, lowest first."""
        return tuple(self.site_module("head", layer) for layer in self.layers_of("head"))

    def layers_of(self, site: str) -> tuple[int, ...]:
        """The numbers of the layers that have a site; in hybrids, not all layers have attention."""
        if site == "residual":
            return tuple(range(self.n_layers))
        if site == "mlp_out":
            return tuple(index for index, layer in enumerate(self.layers) if has(layer, self.mlp))
        return tuple(index for index, sizes in enumerate(self.heads) if sizes is not None)

    def chosen(self, site: str, layers: Iterable[int] | None) -> tuple[int, ...]:
        """The chosen layers as numbers from 0; None: all that have the site.

        Raises:
            TypeError, ValueError: a bad number, a number given twice, or a site that no layer has.
        """
        if layers is not None:
            return check_layers(layers, self.n_layers)
        found = self.layers_of(site)
        if not found:
            self.site_module(site, 0)  # says why
        return found

    def location(
        self, site: str, layers: Iterable[int] | None, positions: tuple[int, ...] | None = None,
        generated: bool = False, paths: dict[str, str] | None = None,
    ) -> Location:  # fmt: skip
        """The location at a site of these layers (None: all that have it), each of which must have it."""
        chosen = self.chosen(site, layers)
        for layer in chosen:
            self.site_module(site, layer)
        heads = self.unusual_heads(site, chosen)
        where = Location(site, chosen, positions, generated, self.fingerprint, dict(paths or {}), heads)
        return replace(where, origin=origin_of(self.model))

    def unusual_heads(self, site: str, layers: Iterable[int]) -> dict[int, tuple[int, int]]:
        """(heads, their width) of those of the layers that differ from most; see `Location.heads`."""
        usual = (self.n_heads, self.head_dim)
        found = {layer: self.heads[layer] for layer in layers} if site == "head" else {}
        return {layer: sizes for layer, sizes in found.items() if sizes is not None and sizes != usual}

    def path_in_layer(self, site: str) -> str:
        """The path from a layer to the module of a site; "": the layer itself, or the module is not known."""
        return {"residual": "", "mlp_out": self.mlp}.get(site, self.projection)

    def site_path(self, site: str, layer: int) -> str:
        """The path from the model to the module of a site."""
        block = f"{self.layers_path}.{layer}"
        return block if site == "residual" else f"{block}.{self.path_in_layer(site)}"

    def site_module(self, site: str, layer: int) -> nn.Module:
        """The module that a site belongs to: its input at the head site, its output at the others.

        Raises:
            ValueError: the layer has no such part, or one that also stands at another layer.
        """
        path = self.path_in_layer(site)
        if site == "mlp_out" and not path:
            raise ValueError(
                f"site: 'mlp_out' of {self.model_type!r} is not certain: its MLP is not known, or may add the residual "
                "stream itself; name the module whose output is the addend: for_model(..., mlp='mlp.down_proj')"
            )
        if not path and site != "residual":
            raise self.uncertain or ValueError(f"site: {self.model_type!r} has no {site!r}")
        at_site = self._modules_at(site)
        module = at_site.modules.get(layer)
        if module is None:
            what = "MLP" if site == "mlp_out" else "attention"
            raise ValueError(f"layers: layer {layer} ({type(self.layers[layer]).__name__}) has no {what} {path!r}")
        if site == "head" and self.heads[layer] is None:
            raise ValueError(f"layers: {path!r} of layer {layer} is a {type(module).__name__} of unknown input width")
        sharing = at_site.layers.get(id(module), [])
        if len(sharing) > 1:
            raise ValueError(
                f"layers: layers {sharing[0]} and {sharing[1]} share one module for the site {site!r} "
                f"({type(module).__name__}): an edit would act at both"
            )
        return module

    def site_module_or_none(self, site: str, layer: int) -> nn.Module | None:
        """`site_module`, or None where it raises an error."""
        try:
            return self.site_module(site, layer)
        except ValueError:
            return None

    def _modules_at(self, site: str) -> _AtSite:
        if site not in self._at_site:
            path = self.path_in_layer(site)
            found = {index: part(layer, path) if path else layer for index, layer in enumerate(self.layers)}
            modules = {index: module for index, module in found.items() if module is not None}
            layers: dict[int, list[int]] = {}
            for layer in self.layers_of(site):
                if layer in modules:
                    layers.setdefault(id(modules[layer]), []).append(layer)
            self._at_site[site] = _AtSite(modules, layers)
        return self._at_site[site]


def layout(model: nn.Module, paths: dict[str, str] | None = None) -> ModelLayout:
    """Read a model's parts and sizes.

    Args:
        model: a Hugging Face causal language model or its base model, compiled, PEFT-wrapped or plain; of a model that
            also sees or hears the text decoder is meant.
        paths: "layers_path", "projection" and "mlp" for a family that is not in the table.

    Raises:
        ImportError: transformers or PyTorch is installed in a version that does not work.
        TypeError: not a module with a Hugging Face config.
        ValueError: an encoder-decoder, or an unknown family whose parts are not certain.
    """
    require_supported()
    refuse_wrapper(model)
    model, paths = unwrap(model), paths or {}
    outer = getattr(model, "config", None)
    if outer is None or not hasattr(outer, "get_text_config"):
        raise TypeError(f"model: got {type(model).__name__}, expected a Hugging Face model with a config")
    if getattr(outer, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder-decoder, expected a causal language model")
    config = text_config(model)
    hidden_size = _size(config, "hidden_size", "d_model")
    if hidden_size is None:
        raise ValueError(f"model: the config of {type(model).__name__} has no hidden_size")
    config_heads = ConfigHeads(config)
    n_heads = config_heads.count() or 1  # a model without attention still has its residual stream
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise ValueError("model: config.slow_but_exact computes the projections outside their modules; set it to False")
    model_type, head_dim = config.model_type, _size(config, "head_dim") or hidden_size // n_heads
    family = FAMILIES.get(model_type)
    path = paths.get("layers_path") or find_layers(model, config, family.layers if family else None)
    layers = submodule(model, path, "layers_path")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"layers_path: {path!r} is a {type(layers).__name__}, expected a list of layers; {HELP}")
    decoder = _owner_of_layers(model, path)
    refuse_parts(model, (decoder, *layers))
    projection = paths.get("projection") or (family.projection if family else None)
    uncertain: ValueError | None = None
    if projection is None:
        try:
            projection = find_projection(layers, model_type, n_heads * head_dim)
        except ValueError as error:  # the model still has its residual stream
            projection, uncertain = "", error
    if paths.get("projection") and not any(has(layer, projection) for layer in layers):
        raise ValueError(f"projection: no layer ({type(layers[0]).__name__}) has a module {projection!r}")
    mlp = paths.get("mlp") or (family.mlp if family else find_mlp(layers))
    heads = tuple(
        heads_of(layer, projection, config_heads, index) if projection else None for index, layer in enumerate(layers)
    )
    usual = Counter(sizes for sizes in heads if sizes is not None).most_common(1)
    n_heads, head_dim = usual[0][0] if usual else (n_heads, head_dim)
    return ModelLayout(
        model=model,
        decoder=decoder,
        layers=tuple(layers),
        layers_path=path,
        projection=projection,
        mlp=mlp,
        heads=heads,
        hidden_size=hidden_size,
        max_context=_size(config, "max_position_embeddings", "max_seq_len"),
        model_type=model_type,
        n_heads=n_heads,
        head_dim=head_dim,
        uncertain=uncertain,
        paths=dict(paths),
    )


def _size(config: Any, *names: str) -> int | None:
    """The first of these sizes that a config has."""
    return next((size for name in names if (size := positive_int(config_value(config, name)))), None)


def _owner_of_layers(model: nn.Module, path: str) -> nn.Module:
    """The module around a model's layers that takes token ids or embeddings."""
    above = path.split(".")[:-1]
    while above:
        owner = submodule(model, ".".join(above), "layers_path")
        if not takes_hidden_states(owner):
            return owner
        above.pop()
    return model
