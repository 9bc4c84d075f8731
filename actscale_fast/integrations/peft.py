"""PEFT: its (IA)³ linear layers on a fused op, and its (IA)³ adapters as interventions and back.

(IA)³ multiplies the input (feed-forward modules) or the output (others) of a linear layer by one learned factor a
channel (arXiv 2205.05638). PEFT keeps the factors in float32 over a bfloat16 model, casts the activation up, multiplies
and casts down: 10 times the activation's bytes forward, 18 times more backward. `accelerate` does each in one pass, 2
and 3 times, with PEFT's own roundings. Where model and adapter have one dtype, forward alone has nothing to gain.

`to_peft_ia3` and `from_peft_ia3` write and read adapter folders; see `_peft_adapters`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import hooks
from ..modules.handle import Handle
from ..ops import backends, scale_channels
from ..ops.registry import is_eager
from ._library import require

require("peft")

from peft.tuners.ia3.layer import IA3Layer, Linear  # noqa: E402

from ._peft_adapters import from_peft_ia3, to_peft_ia3  # noqa: E402

__all__ = ["FusedLinear", "accelerate", "from_peft_ia3", "to_peft_ia3"]


class FusedLinear(Linear):
    """PEFT's (IA)³ linear layer with a forward of one pass over the activation; it holds nothing of its own.

    PEFT's forward runs where the result would differ by more than its roundings, or nothing is to gain: no active or a
    merged adapter, model and adapter of one dtype without a gradient, an adapter that is neither float32 nor of the
    activation's dtype, float64, a tensor subclass, torch.func transforms and forward-mode derivatives, and devices that
    the chosen backend computes in plain PyTorch.
    torch.compile traces it too and fuses it itself, with its neighbours where it has any (one bfloat16 layer of
    4 × 256 × 2048, forward and backward on two CPU cores: PEFT's 3.1 ms, compiled 0.6, the op 0.5, the op in a compiled
    graph 0.6 to 0.7).
    """

    # Whoever wrapped the bound method (accelerate's hooks) calls it after removal too, on a layer of PEFT's own class:
    # therefore no method of this class and no super().
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or torch.compiler.is_compiling():
            return Linear.forward(self, x, *args, **kwargs)
        factors = _factors(self)
        if factors is not None and factors.dtype == x.dtype and not torch.is_grad_enabled():
            factors = None  # 2 bytes a byte either way, and PyTorch's own product is ahead: 0.13 against 0.22 ms
        if factors is None or (self.is_feedforward and not _is_served(x, factors)):
            return Linear.forward(self, x, *args, **kwargs)
        if self.is_feedforward:
            return self.base_layer(scale_channels(x, factors), *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not _is_served(result, factors):
            return (result * factors).to(result.dtype)
        return scale_channels(result, factors)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of PEFT's own class."""
        return _rebuilt, (), self.__dict__


def _rebuilt() -> Linear:
    return Linear.__new__(Linear)


def _factors(layer: Linear) -> Tensor | None:
    """The product of the active adapters' vectors [d]; None where there is none, or their dtypes differ."""
    vectors = [layer.ia3_l[name] for name in layer.active_adapters if name in layer.ia3_l]
    if len({vector.dtype for vector in vectors}) != 1:
        return None
    product = vectors[0].flatten()
    for vector in vectors[1:]:
        product = product * vector.flatten()
    return product


def _is_served(x: Tensor, factors: Tensor) -> bool:
    """Whether a kernel computes x·factors with the roundings of PEFT's `(x.to(dtype) * factors).to(x.dtype)`."""
    return (
        type(x) is Tensor
        and x.dtype in backends.KERNEL_DTYPES
        and factors.dtype in (torch.float32, x.dtype)
        and backends.resolve(x.device, x.dtype) != "reference"
        # Of what makes a call other than eager the op knows modes, but no torch.func and no forward-mode derivative.
        and (is_eager(x, factors) or torch._C._len_torch_dispatch_stack() > 0)
    )


class Accelerated(Handle):
    """The layers that `accelerate` changed: a context manager, and a handle with `remove`.

    Attributes:
        fused: the names of those layers.
        left: name -> why it was left as it is, of every other (IA)³ layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fused: list[str] = []
        self.left: dict[str, str] = {}
        self._layers: list[weakref.ref[nn.Module]] = []
        for name, module in model.named_modules():
            if not isinstance(module, IA3Layer):
                continue
            reason = _why_not(module)
            if reason:
                self.left[name] = reason
            else:
                _set_class(module, FusedLinear)
                self._layers.append(weakref.ref(module))
                self.fused.append(name)

    def remove(self) -> None:
        """Give the layers PEFT's class back; nothing happens the second time, or where the model is gone."""
        for layer in (reference() for reference in self._layers):
            if layer is not None and _class_of(layer) is FusedLinear:
                _set_class(layer, Linear)
        self._layers.clear()


def accelerate(model: nn.Module) -> Accelerated:
    """Run every (IA)³ linear layer of this model, over nn.Linear or Conv1D, in one pass forward and one backward.

    The class of each layer object is swapped for `FusedLinear`, a subclass: parameters, state_dict keys, `isinstance`,
    adding, choosing, disabling, deleting, merging and saving adapters work as before, also while it is on. A compiled
    model is traced again, into the graph of PEFT's own forward. Results equal PEFT's to rounding: y and dx bit for bit,
    the factors' gradient to the order of its sum. Layers that PEFT makes later (an adapter with other target modules)
    are PEFT's own until `accelerate` is called again, which takes only those; one removal gives back what one call
    took. As the op, the layers are once differentiable.

    Args:
        model: a PeftModel, or any module with PEFT's (IA)³ layers in it.

    Returns:
        `Accelerated`: use it in a `with` block, or call `remove()`.

    Raises:
        TypeError: not a module.
        ValueError: no (IA)³ layer in it.

    Example:
        >>> with accelerate(peft_model):
        ...     peft_model(**batch).loss.backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a PeftModel")
    found = Accelerated(model)
    if not (found.fused or found.left):
        raise ValueError(f"model: {type(model).__name__} has no (IA)³ layer, expected a PeftModel with an IA3Config")
    return found


def _why_not(module: nn.Module) -> str:
    """Why this (IA)³ layer stays as it is; "" where it can be fused."""
    kind = _class_of(module)
    if kind is FusedLinear:
        return "already fused"
    if kind is not Linear:
        return f"a {kind.__module__}.{kind.__qualname__}, not peft.tuners.ia3.layer.Linear"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object (accelerate's hooks do that)"
    return ""


def _class_of(module: nn.Module) -> type:
    """The module's class below the mark that `af.patch` may have put on it."""
    return type(module) if hooks.record_of(module) is None else type(module).__mro__[1]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class below that mark, so that either may go first."""
    module.__class__ = cls if hooks.record_of(module) is None else hooks.marked_class(cls)  # type: ignore
