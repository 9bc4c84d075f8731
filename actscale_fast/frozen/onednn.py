"""The matrix products of frozen layers on a CPU, by oneDNN.

PyTorch hands float32 products to MKL, whose kernels are tuned for one vendor's processors; oneDNN, which PyTorch
carries for other dtypes, generates them for the processor at hand. On an AMD EPYC (Zen 4, two threads) the products of
SmolLM2-135M's layers, forward and backward, run at 130, 198 and 204 GFLOP/s with 32, 256 and 768 rows; MKL's at 94, 147
and 183. The weights are not copied or packed.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..modules.hooks import plain_class, replaced_forward


@contextlib.contextmanager
def fast_products(layers: tuple[nn.Module, ...]) -> Iterator[int]:
    """Let the float32 linear layers in `layers` use oneDNN on a CPU; gives how many do. They must be frozen.

    Subclasses of nn.Linear, wrapped modules and other processors keep what they have.
    """
    with contextlib.ExitStack() as undo:
        count = 0
        for layer in layers:
            for module in layer.modules():
                product = _product(module)
                if product is not None:
                    undo.enter_context(replaced_forward(module, product))
                    count += 1
        yield count


def _product(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes the module's output in its place, or None."""
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    if weight.requires_grad or "forward" in module.__dict__ or not available():
        return None
    kind = plain_class(type(module))  # a patch marks its modules
    if kind is nn.Linear:
        return _Product(weight.detach(), module.bias)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):  # for GPT-2: [in, out]
        return _Product(weight.detach().t(), module.bias)
    return None


def available() -> bool:
    """Whether oneDNN is here and has been measured on this kind of processor."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Product:
    """x [..., in] -> x·Wᵀ + b [..., out]."""

    calls_the_class = True  # gives what the module's own forward gives; see `links`

    def __init__(self, weight: Tensor, bias: Any) -> None:
        self.weight, self.bias = weight, None if bias is None else bias.detach()  # [out, in], [out]

    def __call__(self, input: Tensor) -> Tensor:
        # A compiler has products of its own, and inductor stops at this one.
        if input.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return nn.functional.linear(input, self.weight, self.bias)
        return _FrozenLinear.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _onednn(dy, ctx.weight.t(), None), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return nn.functional.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    # Not a view: a model may change it in place (Llama 4's experts do).
    return y.resize_(*x.shape[:-1], weight.shape[0])
