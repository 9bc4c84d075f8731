"""A model as this package sees it: its layers, sites, head and sizes, whatever its family calls them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..interventions.location import Location, ModelFingerprint, check_layers, check_site
from .families import FAMILIES
from .structure import find_family, in_features, submodule


@dataclass(frozen=True)
class ModelLayout:
    """The parts and sizes of a causal language model."""

    model: nn.Module
    decoder: nn.Module  # the module that owns the layers; takes input_ids or inputs_embeds, and attention_mask
    layers: tuple[nn.Module, ...]
    projection: str
    mlp: str
    n_heads: int
    head_dim: int
    hidden_size: int
    max_context: int | None  # tokens; None: the config sets no limit
    model_type: str

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What a saved intervention keeps of the model."""
        return ModelFingerprint(self.model_type, self.n_layers, self.n_heads, self.head_dim, self.hidden_size)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The attention's output projection of every layer."""
        return tuple(self.site_module("head", layer) for layer in range(self.n_layers))

    def site_module(self, site: str, layer: int) -> nn.Module:
        """The module that a site belongs to: its input at the head site, its output at the others.

        Raises:
            ValueError: the layer has no such part, or one of another width.
        """
        block = self.layers[layer]
        if site == "residual":
            return block
        path = self.mlp if site == "mlp_out" else self.projection
        if not path:
            raise ValueError(
                f"site: 'mlp_out' of {self.model_type!r} is not certain: its MLP is not known, or may add the residual "
                "stream itself; name the module whose output is the addend: for_model(..., mlp='mlp.down_proj')"
            )
        try:
            module = block.get_submodule(path)
        except AttributeError:
            part = "MLP" if site == "mlp_out" else "attention"
            raise ValueError(f"layers: layer {layer} ({type(block).__name__}) has no {part} {path!r}") from None
        width = self.n_heads * self.head_dim
        if site == "head" and in_features(module) != width:
            raise ValueError(
                f"layers: the projection {path!r} of layer {layer} takes {in_features(module)} inputs, expected "
                f"{self.n_heads} heads · {self.head_dim} = {width}"
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
        model: a Hugging Face causal language model or its base model, compiled, PEFT-wrapped or plain.
        paths: "layers_path", "projection" and "mlp" for a family that is not in the table.

    Raises:
        TypeError: not a module with a Hugging Face config.
        ValueError: an encoder-decoder, or an unknown family whose parts are not certain.
    """
    model, paths = unwrap(model), paths or {}
    outer = getattr(model, "config", None)
    if outer is None or not hasattr(outer, "get_text_config"):
        raise TypeError(f"model: got {type(model).__name__}, expected a Hugging Face model with a config")
    if getattr(outer, "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} is an encoder-decoder, expected a causal language model")
    config = outer.get_text_config()
    missing = [k for k in ("num_hidden_layers", "num_attention_heads", "hidden_size") if _integer(config, k) is None]
    if missing:
        raise ValueError(f"model: the config of {type(model).__name__} has no {', '.join(missing)}")
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise ValueError("model: config.slow_but_exact computes the projections outside their modules; set it to False")
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = _integer(config, "head_dim") or config.hidden_size // n_heads
    model_type = config.model_type
    family = FAMILIES.get(model_type)
    if family is None or paths:
        known = (
            {} if family is None else {"layers_path": family.layers, "projection": family.projection, "mlp": family.mlp}
        )
        family = find_family(model, model_type, n_layers, n_heads * head_dim, {**known, **paths})
    path = family.layers
    if not _has(model, path) and _has(model, path.partition(".")[2]):
        path = path.partition(".")[2]  # the bare base model
    layers = submodule(model, path, "layers_path")
    decoder = submodule(model, path.rpartition(".")[0], "layers_path")
    return ModelLayout(
        model=model,
        decoder=decoder,
        layers=tuple(layers),  # type: ignore[arg-type]
        projection=family.projection,
        mlp=family.mlp,
        n_heads=n_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        max_context=_integer(config, "max_position_embeddings") or _integer(config, "max_seq_len"),
        model_type=model_type,
    )


def locate(
    model: nn.Module,
    site: str,
    layers: Iterable[int] | None,
    positions: tuple[int, ...] | None,
    generated: bool,
    paths: dict[str, str],
) -> tuple[Location, torch.device]:
    """The checked location of a new intervention, and the device that its parameters belong on."""
    found = layout(model, paths)
    chosen = check_layers(layers, found.n_layers)
    modules = [found.site_module(check_site(site), layer) for layer in chosen]
    location = Location(site, chosen, positions, generated, found.fingerprint, paths)
    return location, execution_device(modules[0]) or torch.device("cpu")


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: accelerate's word where it offloads the weights, otherwise where they lie."""
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    parameter = next(module.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _integer(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
