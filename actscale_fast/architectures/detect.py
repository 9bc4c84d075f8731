"""The parts of a model found by their structure: its layers, the output projection of its attention, and its MLP.

The table of families covers the known models. In others, a part is used where the structure leaves no doubt; otherwise
the caller must name it. Layers may differ: in hybrids only some of them have attention.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from .heads import NO_ATTENTION
from .parts import config_value, has, in_features, kind_of, part

#: What the output projection of attention is called: the last step of its path.
PROJECTION_NAMES = frozenset(
    {"o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "dense_out", "proj_out", "out_lin", "linear_out", "out"}
)
#: Parts of a layer that are not self-attention with heads side by side.
_OTHER_PARTS = (
    "mlp", "ffn", "feed_forward", "feedforward", "expert", "moe", "linear_attn", "lstm", "mamba", "conv", "ssm", "rnn",
    "cross", "encoder_attn", "encoder_attention", "intermediate", "indexer", "compressor", "adapter",
)  # fmt: skip
_MLP_LIKE = re.compile(r"mlp|moe|ffn|feed_?forward|expert")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "feedforward", "mlp_block")
#: MLPs without a module of their own: their first and their last linear layer.
_TWO_PRODUCTS = (("fc1", "fc2"), ("intermediate.dense", "output.dense"))
HELP = (
    "name it: for_model(..., layers_path='model.layers', projection='self_attn.o_proj', mlp='mlp'), "
    "layers_path from the model, the other two from a layer"
)


def find_layers(model: nn.Module, config: Any, known: str | None) -> str:
    """The path of the decoder's layers.

    Args:
        model: the causal language model or its base model.
        config: the config of its text decoder.
        known: the path in the table of families. It may begin one step lower: in a base model, or in the text tower of
            a multimodal model.

    Raises:
        ValueError: no list of layers, or more than one that could be meant.
    """
    if known is not None:
        for path in (known, known.partition(".")[2]):
            if has(model, path):
                return path
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _look_like_layers(module)
    }
    # Lists inside the items of another list are experts and the like.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    lengths = {config_value(config, key) for key in ("num_hidden_layers", "decoder_layers", "n_layer", "n_layers")}
    found = [name for name in outer if len(lists[name]) in lengths]
    for choose in (_of_this_config, _of_the_decoder):
        if len(found) > 1:
            found = choose(model, config, found) or found
    if len(found) != 1:
        raise ValueError(
            f"model: the family {config.model_type!r} is not known, and {len(found)} of its parts look like the list "
            f"of its layers ({', '.join(found) or 'none'}); {HELP}"
        )
    return found[0]


def find_projection(layers: nn.ModuleList, model_type: str, head_width: int) -> str:
    """The path from a layer to the output projection of its attention.

    Args:
        layers: the decoder's layers.
        model_type: the family's name, for the error message.
        head_width: heads · width according to the config, which decides between several candidates.

    Raises:
        ValueError: no candidate, or several.
    """
    names: dict[str, set[int | None]] = {}
    for layer in layers:
        for name, module in layer.named_modules():
            last = name.rpartition(".")[2]
            if last in PROJECTION_NAMES and in_features(module) is not None and _may_attend(layer, name):
                names.setdefault(name, set()).add(in_features(module))
    fits = [name for name in names if names[name] == {head_width}]
    attention = [name for name in names if any(_says_attention(layer, name) for layer in layers)]
    found = sorted({*attention, *fits})
    if len(attention) > 1 and set(fits) & set(attention):
        found = sorted(fits)
    if len(found) != 1:
        raise ValueError(
            f"model: the family {model_type!r} is not known, and the output projection of its attention is not certain "
            f"(found: {', '.join(found) or 'no attention with heads'}); {HELP}"
        )
    return found[0]


def find_mlp(layers: nn.ModuleList) -> str:
    """The MLP's name; "" where it is not certain: an MLP that takes more than the activation may add the residual."""
    for name in MLP_NAMES:
        owners = [layer for layer in layers if isinstance(getattr(layer, name, None), nn.Module)]
        if owners:
            alone = all(_takes_one(getattr(layer, name)) and not _other_mlps(layer, name) for layer in owners)
            return name if alone else ""
    for before, name in _TWO_PRODUCTS:
        if all(in_features(part(layer, path) or layer) is not None for layer in layers for path in (before, name)):
            return name
    return ""


def _other_mlps(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a second MLP, whose output is added too."""
    return any(
        _MLP_LIKE.search(other) and any(p.dim() > 1 for p in child.parameters())
        for other, child in layer.named_children()
        if other != name
    )


def _takes_one(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(required) == 1


def _look_like_layers(modules: nn.ModuleList) -> bool:
    """Whether every item has several parts and several weights."""
    return all(sum(1 for _ in item.parameters()) > 1 and sum(1 for _ in item.children()) > 1 for item in modules)


def _may_attend(layer: nn.Module, name: str) -> bool:
    """Whether a projection may belong to self-attention, as far as names tell."""
    if "." not in name or any(other in name.lower() for other in _OTHER_PARTS):
        return False
    return not any(NO_ATTENTION.search(kind) for kind in _kinds(layer, name))


def _says_attention(layer: nn.Module, name: str) -> bool:
    """Whether the path of a projection, or a class on the way, is called attention."""
    return part(layer, name) is not None and bool(
        re.search(r"attention|attn", " ".join([*_kinds(layer, name), name]), re.IGNORECASE)
    )


def _kinds(layer: nn.Module, name: str) -> list[str]:
    """The class names of the parts of a layer on the way to a projection, without the family's name."""
    steps = name.split(".")
    return [kind_of(part(layer, ".".join(steps[:end])), layer) for end in range(1, len(steps))]


def _of_this_config(model: nn.Module, config: Any, names: list[str]) -> list[str]:
    """The lists whose owner has the config of the text decoder."""
    own = {name: getattr(part(model, name.rpartition(".")[0]) or model, "config", None) for name in names}
    return [name for name in names if getattr(own[name], "model_type", None) == config.model_type]


def _of_the_decoder(model: nn.Module, config: Any, names: list[str]) -> list[str]:
    """The lists in the module that the model itself calls its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return [name for name in names if (part(model, name.rpartition(".")[0]) or model) is decoder]
