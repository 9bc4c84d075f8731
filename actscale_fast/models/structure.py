"""The parts of a family that is not in the table, found by their structure where that is certain."""

from __future__ import annotations

import inspect

from torch import nn

from .families import Family

#: Names that attention's output projections go by; the last step of the module's path.
PROJECTION_NAMES = frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo", "dense_out", "proj_out"})
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_HELP = (
    "name it: for_model(..., layers_path='model.layers', projection='self_attn.o_proj', mlp='mlp'), "
    "layers_path from the model, the other two from a layer"
)


def in_features(module: nn.Module) -> int | None:
    """The input width of a linear layer, of GPT-2's Conv1D, or of a wrapper that has the same attributes."""
    width = getattr(module, "in_features", getattr(module, "nx", None))
    return width if isinstance(width, int) else None


def find_family(
    model: nn.Module, model_type: str, n_layers: int, attention_width: int, paths: dict[str, str]
) -> Family:
    """The family's paths, from those given and, for the rest, from the model's structure.

    Args:
        model: the causal language model or its base model.
        model_type: for the messages.
        n_layers, attention_width: from the config; attention_width is heads · head_dim.
        paths: "layers_path", "projection" and "mlp" where the caller named them.

    Raises:
        ValueError: the layers, or the projection in each layer, are not exactly one.
    """
    layers_path = paths.get("layers_path") or _layers_path(model, model_type, n_layers)
    layers = submodule(model, layers_path, "layers_path")
    if not isinstance(layers, nn.ModuleList) or len(layers) != n_layers:
        raise ValueError(f"layers_path: {layers_path!r} is not a list of {n_layers} layers; {_HELP}")
    projection = paths.get("projection") or _projection(layers, model_type, attention_width)
    return Family(layers_path, projection, paths.get("mlp") or _mlp(layers))


def submodule(module: nn.Module, path: str, name: str) -> nn.Module:
    """`module.get_submodule(path)`, or a ValueError that names the argument."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{name}: {type(module).__name__} has no module {path!r}") from None


def _layers_path(model: nn.Module, model_type: str, n_layers: int) -> str:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and len({type(layer) for layer in module}) == 1
    ]
    if len(found) != 1:
        raise ValueError(
            f"model: the family {model_type!r} is not known, and {len(found)} of its parts look like the list of "
            f"{n_layers} layers ({', '.join(found) or 'none'}); {_HELP}"
        )
    return found[0]


def _projection(layers: nn.ModuleList, model_type: str, attention_width: int) -> str:
    common: set[str] | None = None
    for layer in layers:
        names = {
            name
            for name, module in layer.named_modules()
            if name.rpartition(".")[2] in PROJECTION_NAMES and in_features(module) == attention_width
        }
        common = names if common is None or common == names else set()
    if common is None or len(common) != 1:
        raise ValueError(
            f"model: the family {model_type!r} is not known, and the output projection of its attention is not certain "
            f"(with {attention_width} inputs: {', '.join(sorted(common or ())) or 'none in every layer'}); {_HELP}"
        )
    return common.pop()


def _mlp(layers: nn.ModuleList) -> str:
    """The MLP's name where there is one that takes the activation alone: one that takes more may add the residual."""
    for name in MLP_NAMES:
        module = getattr(layers[0], name, None)
        if isinstance(module, nn.Module):
            parameters = inspect.signature(module.forward).parameters.values()
            required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            return name if len(required) == 1 else ""
    return ""
