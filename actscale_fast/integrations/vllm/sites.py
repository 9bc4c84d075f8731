"""Finds the attention layers that can be steered, and shows by a short run of each that they are what they seem.

The output of vLLM's `Attention` must enter the output projection as it is, with the heads of this rank side by side. A
norm or a gate in between, as some families have, would make the same parameters mean something else. So each attention
block runs once on two tokens, with random numbers in place of the attention's output: what the next linear layer gets
must equal them bit for bit. This layer is the output projection. What it returns, summed over the ranks, is the site
"attn_out", as in transformers: before any norm.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._token_rows import rank_heads
from .served_model import ServedModel
from .settings import VECTORS_AT_OUTPUT

_INSTEAD = "start the server without ACTSCALE_INTERVENTIONS, or serve a merged checkpoint (docs/serving.md)"


class Site(NamedTuple):
    """An attention layer that can be steered."""

    layer: int
    attention: nn.Module
    name: str
    projection: nn.Module  # that its output enters


class _Reached(Exception):  # noqa: N818 (not an error)
    """Ends the short run once a linear layer has got the attention's output."""


def attention_sites(model: nn.Module, served: ServedModel, *, rank: int, size: int, dtype: torch.dtype) -> list[Site]:
    """The attention layers of a loaded model, in the order of its layers.

    Args:
        model: the model of this worker.
        served: the shape that the model must have.
        rank, size: of the tensor-parallel group.
        dtype: of the activations.

    Raises:
        ValueError: a layer that is missing, occurs twice, or is not what the head site needs; with the reason.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    n_heads = len(rank_heads(served.n_heads, rank, size))
    modules = dict(model.named_modules())
    found: dict[int, Site] = {}
    for name, module in modules.items():
        if not isinstance(module, AttentionLayerBase):
            continue
        reason = _not_plain(module, n_heads, served.head_dim)
        layer = extract_layer_index(module.layer_name) if reason is None else -1
        if reason is None and layer in found:
            reason = f"layer {layer} has two attention layers"
        if reason is None:
            projection = _projection(modules, name, module, served.hidden_size, dtype)
            if isinstance(projection, str):
                reason = projection
            elif VECTORS_AT_OUTPUT in served.kinds:
                reason = _not_whole_output(projection, served.hidden_size, size)
        if reason is not None:
            raise ValueError(f"actscale_fast: {type(model).__name__}: {name}: {reason}; {_INSTEAD}")
        assert isinstance(projection, nn.Module)
        found[layer] = Site(layer, module, name, projection)
    missing = sorted(set(range(served.n_layers)) - set(found))
    if missing or len(found) != served.n_layers:
        raise ValueError(
            f"actscale_fast: {type(model).__name__}: attention was found in {len(found)} of {served.n_layers} layers "
            f"(not in {', '.join(map(str, missing[:10]))}); {_INSTEAD}"
        )
    return [found[layer] for layer in range(served.n_layers)]


def _not_plain(module: Any, n_heads: int, head_dim: int) -> str | None:
    """Why a layer is not attention over heads of the expected number and width; None: it is."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    kind = type(module).__name__
    if not isinstance(module, Attention) or type(module).forward is not Attention.forward:
        return f"a {kind}, whose output is not that of plain heads"
    if module.attn_type != AttentionType.DECODER:
        return f"a {kind} of the type {module.attn_type!r}, expected the attention of a decoder"
    sizes = (module.num_heads, module.head_size, module.head_size_v)
    if sizes != (n_heads, head_dim, head_dim):
        return (
            f"{sizes[0]} heads of width {sizes[1]} (values: {sizes[2]}), expected {n_heads} of {head_dim} on this rank"
        )
    return None


def _not_whole_output(projection: Any, hidden_size: int, size: int) -> str | None:
    """Why what a projection returns is not the attention block's output on every rank; None: it is."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    kind = type(projection).__name__
    if not isinstance(projection, RowParallelLinear) or type(projection).forward is not RowParallelLinear.forward:
        return f"its projection is a {kind}, at whose output {VECTORS_AT_OUTPUT} cannot be served"
    if projection.output_size != hidden_size:
        return f"its projection returns {projection.output_size} numbers per token, expected {hidden_size}"
    if size > 1 and not (projection.reduce_results and projection.tp_size == size):
        return f"its projection does not sum over the {size} ranks itself, as {VECTORS_AT_OUTPUT} needs"
    return None


def _projection(
    modules: dict[str, nn.Module], name: str, attention: Any, hidden_size: int, dtype: torch.dtype
) -> nn.Module | str:
    """The linear layer that gets the attention layer's output as it is, or the reason why there is none."""
    parent = modules[name.rpartition(".")[0]]
    device = next((tensor.device for tensor in parent.parameters()), torch.device("cpu"))
    try:
        arguments = _arguments(parent, hidden_size, device, dtype)
    except ValueError as error:
        return str(error)
    width = attention.num_heads * attention.head_size
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, width, generator=generator).to(device, dtype)
    reached: list[tuple[nn.Module, Any]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if attended:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            reached.append((module, given[0] if given else None))
            raise _Reached

    attended: list[bool] = []

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        attended.append(True)
        return output.clone()

    hooks = [
        module.register_forward_pre_hook(stop, with_kwargs=True)
        for module in parent.modules()
        if hasattr(module, "quant_method") and module is not attention
    ]
    attention.forward = attend  # of this instance, for a moment
    try:
        with torch.inference_mode():
            parent(**arguments)
    except _Reached:
        pass
    except Exception as error:
        return f"the short run that verifies {type(parent).__name__} failed: {type(error).__name__}: {error}"
    finally:
        del attention.forward
        for hook in hooks:
            hook.remove()
    if not reached:
        return f"no projection of {type(parent).__name__} gets the attention's output"
    module, given = reached[0]
    if given is None or given.shape != output.shape or not torch.equal(given, output):
        return (
            f"what enters {type(module).__name__} of {type(parent).__name__} is not the attention's output: a norm, a "
            "gate or another operation stands in between"
        )
    return module


#: What a parameter of an attention block's forward method stands for.
_POSITIONS = ("positions", "position_ids")
_HIDDEN = ("hidden_states", "x", "hidden_state")


def _arguments(parent: nn.Module, hidden_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Tensor] = {}
    for name, parameter in inspect.signature(parent.forward).parameters.items():
        if name in _POSITIONS:
            values[name] = torch.arange(2, device=device)
        elif name in _HIDDEN:
            values[name] = torch.randn(2, hidden_size, generator=generator).to(device, dtype)
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            raise ValueError(
                f"{type(parent).__name__}.forward takes {name!r}, so that the check of its heads cannot run it"
            )
    return values
