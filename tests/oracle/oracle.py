"""What an intervention should do, computed without the package: plain torch hooks and transformers' attention function.

Heads are scaled where the attention function returns them, [B, T, heads, width of a value head]: whatever the family
does with them afterwards is done by the family. A family with an attention of its own gets the heads scaled in its
weights, on a copy: rows of the value projection, or columns of the output projection.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy

#: By layer: factors [T or 1, heads] at the head site, [T or 1, 1] at a whole site.
Factors = dict[int, Tensor]


class Oracle:
    """Scales the sites of one model.

    Args:
        model: a causal language model.
        anatomy: where its parts are.
        ids: [B, T], what the first, unscaled pass is made with; it shows which layers have heads, and how many.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, ids: Tensor) -> None:
        self.model, self.anatomy = model, anatomy
        self.layers = list(model.get_submodule(anatomy.layers)) if anatomy.layers else []  # type: ignore[arg-type]
        self.current = -1  # the layer that is running
        self.uses: dict[int, int] = {}
        self.heads: dict[int, tuple[int, int]] = {}  # (heads, width) of each layer that has them
        self.attention_calls: dict[int, int] = {}
        with self._tracking(self._count), torch.no_grad():
            call(model, ids)
        if anatomy.own_heads:
            self._count_own()

    def acts_at(self, site: str) -> list[int] | None:
        """The layers that have the site; None: the family does not have it, or not in one place."""
        if site == "head":
            return sorted(self.heads) or None
        if site == "residual":
            return list(range(len(self.layers))) if self.layers and self.anatomy.residual else None
        found = []
        for index in range(len(self.layers)):
            modules = self.modules(site, index)
            if modules and (site != "attn_out" or index in self.heads):
                found.append(index)
        return found or None

    def modules(self, site: str, layer: int) -> list[nn.Module]:
        """The modules whose outputs add up to the site."""
        if site == "residual":
            return [self.layers[layer]]
        paths = self.anatomy.mlp if site == "mlp_out" else (self.anatomy.projection,)
        found = []
        for path in paths:
            with contextlib.suppress(AttributeError):
                module = self.layers[layer].get_submodule(path) if path else None
                if module is not None:
                    found.append(module)
        return found

    def logits(self, ids: Tensor, site: str, factors: Factors, **arguments: Any) -> Tensor:
        """The logits [B, T, V] with every factor applied."""
        with self.scaled(site, factors) as model:
            return call(model, ids, **arguments)

    @contextlib.contextmanager
    def scaled(self, site: str, factors: Factors) -> Iterator[nn.Module]:
        """A model whose forward passes are scaled: the model itself, or a copy with scaled weights.

        Factors by token may be exchanged in the dictionary from one forward pass to the next.
        """
        if site == "head":
            constant = all(value.shape[0] == 1 and not value.requires_grad for value in factors.values())
            if self.anatomy.own_heads:
                if constant:
                    yield self._with_weights(factors)
                else:
                    with self.columns(factors):
                        yield self.model
                return
            with self._tracking(lambda layer, output: _times(output, factors.get(layer))):
                yield self.model
            return
        time = self.anatomy.time if site == "residual" else (0 if self.anatomy.time == 0 else 1)
        with contextlib.ExitStack() as stack:
            if any(self._shared(site, layer) for layer in factors):
                stack.enter_context(self._tracking(None))
            for layer in factors:
                for module in self.modules(site, layer):
                    hook = _output_hook(self, layer, factors, time, shared=self._shared(site, layer))
                    stack.callback(module.register_forward_hook(hook).remove)
            yield self.model

    def _shared(self, site: str, layer: int) -> bool:
        """Whether another layer has the same module at the site."""
        mine = {id(module) for module in self.modules(site, layer)}
        others = (i for i in range(len(self.layers)) if i != layer)
        return any(mine & {id(module) for module in self.modules(site, other)} for other in others)

    @contextlib.contextmanager
    def _tracking(self, edit: Callable[[int, Tensor], Tensor] | None) -> Iterator[None]:
        """Know the running layer, and pass what the attention function gives inside it through `edit`."""
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                enter = layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
                stack.callback(enter.remove)
                stack.callback(layer.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)
            if edit is not None and not self.anatomy.own_heads:
                stack.enter_context(attention_outputs(lambda module, output: self._edited(module, output, edit)))
            yield

    def _enter(self, index: int) -> None:
        self.current = index
        self.uses[index] = self.uses.get(index, 0) + 1

    def _leave(self) -> None:
        self.current = -1

    def _edited(self, module: nn.Module, output: Tensor, edit: Callable[[int, Tensor], Tensor]) -> Tensor:
        if self.current < 0 or not self.anatomy.attention:
            return output
        try:
            heads = self.layers[self.current].get_submodule(self.anatomy.attention)
        except AttributeError:
            return output
        return edit(self.current, output) if module is heads else output

    def _count(self, layer: int, output: Tensor) -> Tensor:
        self.heads[layer] = (output.shape[2], output.shape[3])
        self.attention_calls[layer] = self.attention_calls.get(layer, 0) + 1
        return output

    def _count_own(self) -> None:
        config: Any = self.model.config
        config = config.get_text_config()
        n_heads = next(
            int(getattr(config, name))
            for name in ("decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads")
            if isinstance(getattr(config, name, None), int)
        )
        for index, layer in enumerate(self.layers):
            projection = layer.get_submodule(self.anatomy.projection)  # type: ignore[arg-type]
            weight: Tensor = projection.weight  # type: ignore[assignment]
            width = weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1]
            self.heads[index] = (n_heads, width // n_heads)

    def _with_weights(self, factors: Factors) -> nn.Module:
        """A copy of the model whose weights scale the heads."""
        changed = copy.deepcopy(self.model)
        layers = list(changed.get_submodule(self.anatomy.layers))  # type: ignore[arg-type]
        with torch.no_grad():
            for layer, factor in factors.items():
                n_heads, width = self.heads[layer]
                rows = factor[0].repeat_interleave(width)
                if self.anatomy.own_heads == "columns":
                    layers[layer].get_submodule(self.anatomy.projection).weight.mul_(rows)  # type: ignore[arg-type]
                    continue
                if self.anatomy.own_heads == "fused":
                    parts = torch.ones(3, n_heads, width, dtype=rows.dtype)
                    parts[2] = factor[0][:, None]
                    rows = (parts if self.anatomy.fused == "qhd" else parts.transpose(0, 1)).reshape(-1)
                value: Any = layers[layer].get_submodule(self.anatomy.value)
                value.weight.mul_(rows if type(value).__name__ == "Conv1D" else rows[:, None])
                if value.bias is not None:
                    value.bias.mul_(rows)
        return changed

    @contextlib.contextmanager
    def columns(self, factors: Factors) -> Iterator[None]:
        """The projection's input scaled token by token: the same heads, checked against the weights beforehand."""
        with contextlib.ExitStack() as stack:
            for layer in factors:
                n_heads, _ = self.heads[layer]
                projection = self.layers[layer].get_submodule(self.anatomy.projection)  # type: ignore[arg-type]

                def scale(_: nn.Module, args: tuple[Any, ...], layer: int = layer, n: int = n_heads) -> Any:
                    x: Tensor = args[0]
                    wide = x.unflatten(-1, (n, -1)) * factors[layer][..., None].to(x.dtype)
                    return (wide.flatten(-2), *args[1:])

                stack.callback(projection.register_forward_pre_hook(scale).remove)
            yield


def _times(output: Tensor, factor: Tensor | None) -> Tensor:
    """[B, T, heads, width] times [T or 1, heads]."""
    return output if factor is None else output * factor[None, :, :, None].to(output.dtype)


def _output_hook(oracle: Oracle, layer: int, factors: Factors, time: int, *, shared: bool) -> Callable[..., Any]:
    def scale(_: nn.Module, args: Any, output: Any) -> Any:
        if shared and oracle.current != layer:
            return None
        factor = factors[layer]
        first = output if isinstance(output, Tensor) else output[0]
        flat = (
            first.dim() == 2
        )  # experts and OPT's MLP see [B·T, d]; only ever of one row where factors differ by token
        shape = [1] * first.dim()
        shape[0 if flat else time] = factor.shape[0]
        scaled = first * factor[:, 0].reshape(shape).to(first.dtype)
        if isinstance(output, Tensor):
            return scaled
        return (scaled, *output[1:]) if isinstance(output, tuple) else [scaled, *output[1:]]

    return scale


@contextlib.contextmanager
def attention_outputs(edit: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Pass the first result of every attention function, [B, T, heads, width], through `edit(module, output)`."""
    from transformers import modeling_utils

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output, *rest = function(module, *args, **kwargs)
            return (edit(module, output), *rest)

        return attention

    interface: Any = modeling_utils.AttentionInterface
    original = getattr(interface, "get_interface", None)
    with contextlib.ExitStack() as stack:
        if original is not None:

            def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
                return wrapped(original(self, implementation, default))

            interface.get_interface = get_interface
            stack.callback(setattr, interface, "get_interface", original)
        else:  # transformers before 5.1: modules take their own eager function, a global of their file
            for module in list(sys.modules.values()):
                there = getattr(module, "__dict__", {}).get("eager_attention_forward")
                if callable(there) and getattr(module, "__name__", "").startswith("transformers.models."):
                    stack.callback(setattr, module, "eager_attention_forward", there)
                    module.eager_attention_forward = wrapped(there)  # type: ignore[attr-defined]
        yield


def call(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    """The model's logits [B, T, V], without a cache."""
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or any(value.kind is value.VAR_KEYWORD for value in accepted.values()):
        arguments["use_cache"] = False
    output = model(ids, **arguments)
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found
