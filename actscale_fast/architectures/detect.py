"""The parts of a model, found by their structure: its layers, the projection of its attention, its MLP, its heads.

The table of families names what is known; the rest is found where it is certain, and named by the caller where not.
Layers may differ: hybrids have attention in some layers only, and heads may differ in number or width.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

#: Names that attention's output projections go by; the last step of the module's path.
PROJECTION_NAMES = frozenset(
    {"o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "dense_out", "proj_out", "out_lin", "linear_out", "out"}
)
#: Parts of a layer that are no self-attention with heads side by side.
_OTHER_PARTS = (
    "mlp", "ffn", "feed_forward", "feedforward", "expert", "moe", "linear_attn", "lstm", "mamba", "conv", "ssm", "rnn",
    "cross", "encoder_attn", "encoder_attention", "intermediate", "indexer", "compressor", "adapter",
)  # fmt: skip
_MLP_LIKE = re.compile(r"mlp|moe|ffn|feed_?forward|expert")
#: Classes of what stands in the place of attention and has no heads that attend: linear attention and the like.
_NO_ATTENTION = re.compile(
    r"linear|lightning|delta|kda|gla|mamba|lstm|retention|recurrent|conv|mixer|ssm|rwkv", re.IGNORECASE
)
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "feedforward", "mlp_block")
#: MLPs that are no module of their own: their first and their last product.
_TWO_PRODUCTS = (("fc1", "fc2"), ("intermediate.dense", "output.dense"))
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "n_local_heads", "nh")
HELP = (
    "name it: for_model(..., layers_path='model.layers', projection='self_attn.o_proj', mlp='mlp'), "
    "layers_path from the model, the other two from a layer"
)


def read(config: Any, name: str) -> Any:
    """What a config has under a name; None: nothing, or a value per layer that it does not name for the whole."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' configs of unlike layers raise an error of their own
        return None


def takes_hidden_states(module: nn.Module) -> bool:
    """Whether a module's forward pass begins with hidden states and not with token ids or embeddings."""
    names = set(inspect.signature(module.forward).parameters)
    return "hidden_states" in names and not names & {"input_ids", "inputs_embeds"}


def in_features(module: nn.Module) -> int | None:
    """The input width of a linear layer, of GPT-2's Conv1D, or of a wrapper that has the same attributes."""
    width = getattr(module, "in_features", getattr(module, "nx", None))
    return width if isinstance(width, int) else None


def has(module: nn.Module, path: str) -> bool:
    """Whether a module has a part of this path."""
    return bool(path) and part(module, path) is not None


def part(module: nn.Module, path: str) -> nn.Module | None:
    """The part of a module, or None where it has none of this path."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """`module.get_submodule(path)`, or a ValueError that names the argument."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{name}: {type(module).__name__} has no module {path!r}") from None


def find_layers(model: nn.Module, config: Any, known: str | None) -> str:
    """The path of the decoder's layers.

    Args:
        model: the causal language model or its base model.
        config: of its text decoder.
        known: the path in the table of families; it is looked for in the whole model, in its base model, and in the
            text tower of a model that sees or hears, too.

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
    # Experts, heads of several scales: lists inside of another list's items.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    lengths = {read(config, key) for key in ("num_hidden_layers", "decoder_layers", "n_layer", "n_layers")}
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
    """The path, from a layer, of attention's output projection; in the layers that have attention.

    Args:
        layers: of the decoder.
        model_type: for the message.
        head_width: heads · width as the config has them, which decides where several could be meant.

    Raises:
        ValueError: none, or no single one.
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
    """The MLP's name where there is one that takes the activation alone: one that takes more may add the residual."""
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
    """Whether a layer has a second part of this kind, whose output is added too."""
    return any(
        _MLP_LIKE.search(other) and any(p.dim() > 1 for p in child.parameters())
        for other, child in layer.named_children()
        if other != name
    )


def heads_of(layer: nn.Module, projection: str, config: Any, index: int) -> tuple[int, int] | None:
    """(heads, their width) of a layer; None: it has no such projection.

    The number is attention's own where the module has one, else the config's. That the projection's input is these
    heads side by side is for the check to show.

    Raises:
        ValueError: the projection's input is not a whole number of vectors, one per head, or of another width than
            attention and config know.
    """
    module = part(layer, projection)
    width = None if module is None else in_features(module)
    if width is None or _NO_ATTENTION.search(_kind(layer, projection.rpartition(".")[0])):
        return None
    own = [_own(layer, projection, (name,)) for name in ("v_head_dim", "head_dim", "head_size")]
    widths = [size for size in (*own, read(config, "v_head_dim"), read(config, "head_dim")) if isinstance(size, int)]
    count = _own(layer, projection, _HEAD_COUNTS) or config_heads(config, index) or (width // (widths or [width])[0])
    if width % count or (widths and width // count not in widths):
        size = (widths or [width // count])[0]
        raise ValueError(
            f"layers: the projection {projection!r} of layer {index} takes {width} inputs, expected {count} heads · "
            f"{size} = {count * size}"
        )
    return count, width // count


def config_heads(config: Any, index: int | None = None) -> int | None:
    """The number of attention heads that a config gives a layer (None: the first number that there is)."""
    for key in ("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads"):
        value = read(config, key)
        if isinstance(value, list | tuple) and value:
            value = value[0 if index is None else min(index, len(value) - 1)]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _kind(layer: nn.Module, path: str) -> str:
    """The class name of a part of a layer without what it shares with the layer's: without the family's name."""
    name = type(part(layer, path)).__name__ if path else ""
    pairs = enumerate(zip(name, type(layer).__name__, strict=False))
    shared = next((place for place, (own, other) in pairs if own != other), len(name))
    while 0 < shared < len(name) and not name[shared].isupper():  # back to the end of a word
        shared -= 1
    return name[shared:]


def _own(layer: nn.Module, projection: str, names: tuple[str, ...]) -> int | None:
    """A size that the attention module, or one around it, has under one of these names."""
    steps = projection.split(".")
    for end in range(len(steps) - 1, 0, -1):
        module = part(layer, ".".join(steps[:end]))
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _takes_one(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(required) == 1


def _look_like_layers(modules: nn.ModuleList) -> bool:
    """Whether all items are made of several parts that have weights."""
    return all(sum(1 for _ in item.parameters()) > 1 and sum(1 for _ in item.children()) > 1 for item in modules)


def _may_attend(layer: nn.Module, name: str) -> bool:
    """Whether nothing says that a projection belongs to something else than self-attention."""
    if "." not in name or any(other in name.lower() for other in _OTHER_PARTS):
        return False
    return not any(_NO_ATTENTION.search(kind) for kind in _kinds(layer, name))


def _says_attention(layer: nn.Module, name: str) -> bool:
    """Whether a projection's path, or a class on its way, is called attention."""
    return part(layer, name) is not None and bool(
        re.search(r"attention|attn", " ".join([*_kinds(layer, name), name]), re.IGNORECASE)
    )


def _kinds(layer: nn.Module, name: str) -> list[str]:
    """The class names of the parts of a layer on the way to a projection."""
    steps = name.split(".")
    return [_kind(layer, ".".join(steps[:end])) for end in range(1, len(steps))]


def _of_this_config(model: nn.Module, config: Any, names: list[str]) -> list[str]:
    """Those whose owner says that it is of the text decoder's config."""
    own = {name: getattr(part(model, name.rpartition(".")[0]) or model, "config", None) for name in names}
    return [name for name in names if getattr(own[name], "model_type", None) == config.model_type]


def _of_the_decoder(model: nn.Module, config: Any, names: list[str]) -> list[str]:
    """Those that stand in what the model itself calls its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return [name for name in names if (part(model, name.rpartition(".")[0]) or model) is decoder]
