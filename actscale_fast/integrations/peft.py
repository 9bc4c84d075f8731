"""PEFT: its (IA)³ linear layers on a fused op, and conversion between its (IA)³ adapters and interventions.

(IA)³ multiplies the input (feed-forward modules) or the output (others) of a linear layer by one learned factor per
channel (arXiv 2205.05638). With float32 factors and a bfloat16 model, PEFT casts the activation up, multiplies, and
casts down, which moves 10 times the activation's bytes forward and 18 times backward. `accelerate` moves 2 and 3 times
the bytes, in one pass each, with PEFT's own roundings. `to_peft_ia3` and `from_peft_ia3` convert adapter folders.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import hooks
from ..modules.handle import Handle
from ..ops import backends, scale_channels
from ..ops.torch_internals import is_eager
from ._library import require

require("peft")

from peft.tuners.ia3.layer import IA3Layer, Linear  # noqa: E402

from ._peft_adapters import from_peft_ia3, to_peft_ia3  # noqa: E402

__all__ = ["FusedLinear", "accelerate", "from_peft_ia3", "to_peft_ia3"]


class FusedLinear(Linear):
    """PEFT's (IA)³ linear layer whose forward passes over the activation once; it has no state of its own.

    PEFT's own forward runs where the result would differ by more than PEFT's roundings or nothing is gained: no active
    adapter or a merged one, model and adapter of the same dtype without a gradient, an adapter that is neither float32
    nor of the activation's dtype, float64, tensor subclasses, torch.func transforms, forward-mode derivatives, devices
    on which the chosen backend uses plain PyTorch, and torch.compile, which fuses PEFT's forward itself.
    """

    # Hooks of accelerate that wrapped this bound method may call it after removal, when the layer has PEFT's own class
    # again: therefore it uses neither methods of this class nor super().
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or torch.compiler.is_compiling():
            return Linear.forward(self, x, *args, **kwargs)
        factors = _factors(self)
        if factors is not None and factors.dtype == x.dtype and not torch.is_grad_enabled():
            factors = None  # both move as many bytes, and PyTorch's own product is faster
        if factors is None or (self.is_feedforward and not _is_served(x, factors)):
            return Linear.forward(self, x, *args, **kwargs)
        if self.is_feedforward:
            return self.base_layer(scale_channels(x, factors), *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not _is_served(result, factors):
            return (result * factors).to(result.dtype)
        return scale_channels(result, factors)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles have PEFT's own class."""
        return _rebuilt, (), self.__dict__


def _rebuilt() -> Linear:
    return Linear.__new__(Linear)


def _factors(layer: Linear) -> Tensor | None:
    """The product of the active adapters' vectors [d]; None if there are none or their dtypes differ."""
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
        and backends.serving("scale_channels", x) != "reference"
        # The op supports dispatch modes, but neither torch.func nor forward-mode derivatives.
        and (is_eager(x, factors) or torch._C._len_torch_dispatch_stack() > 0)
    )


class Accelerated(Handle):
    """The layers that `accelerate` changed: a context manager with a method `remove`.

    Attributes:
        fused: the names of those layers.
        left: the name of every other (IA)³ layer -> the reason why it was left unchanged.
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
        """Restore PEFT's class; a second call does nothing."""
        for layer in (reference() for reference in self._layers):
            if layer is not None and _class_of(layer) is FusedLinear:
                _set_class(layer, Linear)
        self._layers.clear()


def accelerate(model: nn.Module) -> Accelerated:
    """Run every (IA)³ linear layer of this model, over nn.Linear or Conv1D, in one pass forward and one backward.

    The class of each layer is changed to `FusedLinear`, a subclass: parameters, state_dict keys and `isinstance` stay
    the same, and adapters can be added, chosen, disabled, deleted, merged and saved as before. A compiled model is
    traced again, with PEFT's own forward. y and dx equal PEFT's bit for bit, the factors' gradient up to the order of
    summation; the layers are once differentiable. Layers that PEFT creates later (for an adapter with other target
    modules) stay PEFT's own until `accelerate` is called again, which changes only those. `remove` undoes one call.

    Args:
        model: a PeftModel, or any module that contains PEFT's (IA)³ layers.

    Returns:
        A handle: use it in a `with` block, or call its `remove()`.

    Raises:
        TypeError: not a module.
        ValueError: the module contains no (IA)³ layer.

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
    """Why this (IA)³ layer cannot be fused; empty if it can."""
    kind = _class_of(module)
    if kind is FusedLinear:
        return "already fused"
    if kind is not Linear:
        return f"a {kind.__module__}.{kind.__qualname__}, not peft.tuners.ia3.layer.Linear"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object (accelerate's hooks do that)"
    return ""


def _class_of(module: nn.Module) -> type:
    """The module's class without the mark that `af.patch` may have put on it."""
    return type(module) if hooks.record_of(module) is None else type(module).__mro__[1]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class below that mark, so that either can be removed first."""
    module.__class__ = cls if hooks.record_of(module) is None else hooks.marked_class(cls)  # type: ignore
