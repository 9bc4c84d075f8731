"""A model as this package sees it: its layers, sites, head and sizes, whatever its family calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._versions import require_supported
from .detect import (
    HELP,
    config_heads,
    find_layers,
    find_mlp,
    find_projection,
    has,
    heads_of,
    part,
    read,
    submodule,
    takes_hidden_states,
)
from .families import FAMILIES
from .location import Location, ModelFingerprint, check_layers


@dataclass(frozen=True)
class ModelLayout:
    """The parts and sizes of a causal language model."""

    model: nn.Module
    decoder: nn.Module  # the module that owns the layers; takes input_ids or inputs_embeds, and attention_mask
    layers: tuple[nn.Module, ...]
    layers_path: str  # of the layers in the model
    projection: str
    mlp: str
    #: (heads, their width) of each layer's attention; None: the layer has none.
    heads: tuple[tuple[int, int] | None, ...]
    hidden_size: int
    max_context: int | None  # tokens; None: the config sets no limit
    model_type: str
    n_heads: int  # of most layers that have heads
    head_dim: int  # of most layers that have heads
    uncertain: ValueError | None = None  # why no projection was found
    paths: dict[str, str] = field(default_factory=dict)  # those that the caller named
    _found: dict[str, dict[int, nn.Module]] = field(default_factory=dict, repr=False, compare=False)
    _twins: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What a saved intervention keeps of the model."""
        return ModelFingerprint(self.model_type, self.n_layers, self.n_heads, self.head_dim, self.hidden_size)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The attention's output projection of every layer that has heads, lowest first."""
        return tuple(self.site_module("head", layer) for layer in self.layers_of("head"))

    def layers_of(self, site: str) -> tuple[int, ...]:
        """The numbers of the layers that have a site: of the head site those with attention, in hybrids not all."""
        if site == "residual":
            return tuple(range(self.n_layers))
        if site == "mlp_out":
            return tuple(index for index, layer in enumerate(self.layers) if has(layer, self.mlp))
        return tuple(index for index, sizes in enumerate(self.heads) if sizes is not None)

    def chosen(self, site: str, layers: Iterable[int] | None) -> tuple[int, ...]:
        """The chosen layers as numbers from 0; None: all that have the site.

        Raises:
            TypeError, ValueError: a bad number, or one twice; no layer has the site.
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
        heads = self.heads_apart(site, chosen)
        return Location(site, chosen, positions, generated, self.fingerprint, dict(paths or {}), heads)

    def heads_apart(self, site: str, layers: Iterable[int]) -> dict[int, tuple[int, int]]:
        """`Location.heads` of these layers."""
        usual = (self.n_heads, self.head_dim)
        found = {layer: self.heads[layer] for layer in layers} if site == "head" else {}
        return {layer: sizes for layer, sizes in found.items() if sizes is not None and sizes != usual}

    def site_path(self, site: str, layer: int) -> str:
        """The path in the model of the module that a site belongs to."""
        block = f"{self.layers_path}.{layer}"
        return block if site == "residual" else f"{block}.{self.mlp if site == 'mlp_out' else self.projection}"

    @property
    def vocabulary(self) -> int:
        """Tokens that the config counts."""
        return _integer(text_config(self.model), "vocab_size") or 1

    def site_module_or_none(self, site: str, layer: int) -> nn.Module | None:
        """`site_module`, or None where it refuses."""
        try:
            return self.site_module(site, layer)
        except ValueError:
            return None

    def _modules_of(self, site: str) -> dict[int, nn.Module]:
        """The module of a site in each layer that has one, found once."""
        known = self._found.get(site)
        if known is None:
            path = "" if site == "residual" else self.mlp if site == "mlp_out" else self.projection
            found = {index: layer if not path else part(layer, path) for index, layer in enumerate(self.layers)}
            known = self._found[site] = {index: module for index, module in found.items() if module is not None}
        return known

    def _shared(self, site: str) -> dict[int, tuple[int, int]]:
        """The identities of modules that stand at two layers, and these, found once."""
        if site in self._twins:
            return self._twins[site]
        first: dict[int, int] = {}
        shared = self._twins.setdefault(site, {})
        own = set(self.layers_of(site))
        for layer, module in self._modules_of(site).items():
            if layer in own and first.setdefault(id(module), layer) != layer:
                shared.setdefault(id(module), (first[id(module)], layer))
        return shared

    def site_module(self, site: str, layer: int) -> nn.Module:
        """The module that a site belongs to: its input at the head site, its output at the others.

        Raises:
            ValueError: the layer has no such part, or one that stands at another layer too.
        """
        block = self.layers[layer]
        path = "" if site == "residual" else self.mlp if site == "mlp_out" else self.projection
        if site == "mlp_out" and not path:
            raise ValueError(
                f"site: 'mlp_out' of {self.model_type!r} is not certain: its MLP is not known, or may add the residual "
                "stream itself; name the module whose output is the addend: for_model(..., mlp='mlp.down_proj')"
            )
        if not path and site != "residual":
            raise self.uncertain or ValueError(f"site: {self.model_type!r} has no {site!r}")
        module = self._modules_of(site).get(layer)
        if module is None:
            what = "MLP" if site == "mlp_out" else "attention"
            raise ValueError(f"layers: layer {layer} ({type(block).__name__}) has no {what} {path!r}")
        if site == "head" and self.heads[layer] is None:
            raise ValueError(f"layers: {path!r} of layer {layer} is a {type(module).__name__} of unknown input width")
        shared = self._shared(site).get(id(module))
        if shared is not None:
            raise ValueError(
                f"layers: layers {shared[0]} and {shared[1]} share one module for the site {site!r} "
                f"({type(module).__name__}): an edit would act at both"
            )
        return module


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside torch.compile's and PEFT's wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a Hugging Face causal language model")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None or inner is model:
            return model
        model = inner


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
    model, paths = unwrap(model), paths or {}
    outer = getattr(model, "config", None)
    if outer is None or not hasattr(outer, "get_text_config"):
        raise TypeError(f"model: got {type(model).__name__}, expected a Hugging Face model with a config")
    if getattr(outer, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder-decoder, expected a causal language model")
    config = text_config(model)
    hidden_size = _integer(config, "hidden_size") or _integer(config, "d_model")
    if hidden_size is None:
        raise ValueError(f"model: the config of {type(model).__name__} has no hidden_size")
    n_heads = config_heads(config) or 1  # a model without attention has its residual stream all the same
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise ValueError("model: config.slow_but_exact computes the projections outside their modules; set it to False")
    model_type, head_dim = config.model_type, _integer(config, "head_dim") or hidden_size // n_heads
    family = FAMILIES.get(model_type)
    path = paths.get("layers_path") or find_layers(model, config, family.layers if family else None)
    layers = submodule(model, path, "layers_path")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(f"layers_path: {path!r} is a {type(layers).__name__}, expected a list of layers; {HELP}")
    decoder, above = model, path.split(".")[:-1]
    while above:  # the layers' owner, or of BERT's kind the module around it
        owner = submodule(model, ".".join(above), "layers_path")
        if not takes_hidden_states(owner):
            decoder = owner
            break
        above.pop()
    projection = paths.get("projection") or (family.projection if family else None)
    uncertain: ValueError | None = None
    if projection is None:
        try:
            projection = find_projection(layers, model_type, n_heads * head_dim)
        except ValueError as error:  # the residual stream is there all the same
            projection, uncertain = "", error
    if paths.get("projection") and not any(has(layer, projection) for layer in layers):
        raise ValueError(f"projection: no layer ({type(layers[0]).__name__}) has a module {projection!r}")
    mlp = paths.get("mlp") or (family.mlp if family else find_mlp(layers))
    heads = tuple(
        heads_of(layer, projection, config, index) if projection else None for index, layer in enumerate(layers)
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
        max_context=_integer(config, "max_position_embeddings") or _integer(config, "max_seq_len"),
        model_type=model_type,
        n_heads=n_heads,
        head_dim=head_dim,
        uncertain=uncertain,
        paths=dict(paths),
    )


def text_config(model: nn.Module) -> Any:
    """The config of a model's text decoder; of BART's kind the decoder's half of it."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def embedding_weight(model: nn.Module) -> torch.Tensor:
    """The weight [V, d] of a model's token embedding.

    Raises:
        ValueError: it takes no ids of text tokens.
    """
    embedding: Any = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(
            f"model: {type(model).__name__} has a {type(embedding).__name__} in the place of a token embedding, "
            "expected a model of text"
        )
    return weight


def input_device(model: nn.Module) -> torch.device:
    """Where token ids belong: where the embedding computes."""
    return execution_device(unwrap(model).get_input_embeddings()) or torch.device("cpu")  # type: ignore[operator]


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: accelerate's word where it offloads the weights, otherwise where they lie."""
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


def _integer(config: Any, name: str) -> int | None:
    value = read(config, name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
