"""The frozen layers' matrix products by oneDNN: those of PyTorch to rounding, and only where they are meant."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import actscale_fast as af
from actscale_fast.frozen.onednn import available, fast_products

pytestmark = pytest.mark.skipif(not available(), reason="oneDNN's products are for x86-64")


def linear(n_in: int, n_out: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias).requires_grad_(False)


def conv1d(n_in: int, n_out: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


def assert_rounded_sums(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """|error| ≤ n·eps·Σ|x·w| of each element: any order of summing n products in float32 keeps it."""
    terms = [None if value is None else value.double() for value in (x, weight, bias)]
    sizes = F.linear(*(None if value is None else value.abs() for value in terms))  # type: ignore[arg-type]
    n_terms = x.shape[-1] + (bias is not None)
    error = (found.double() - F.linear(*terms)).abs()  # type: ignore[arg-type]
    assert (error <= n_terms * torch.finfo(torch.float32).eps * sizes).all()


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (2, 1, 7), (257,)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (17, 31), (64, 48), (507, 123)], ids=str)
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_products_are_those_of_pytorch(shape: tuple[int, ...], sizes: tuple[int, int], kind: str) -> None:
    n_in, n_out = sizes
    layer = conv1d(n_in, n_out) if kind == "Conv1D" else linear(n_in, n_out, kind == "bias")
    x, dy = torch.randn(*shape, n_in), torch.randn(*shape, n_out)
    with fast_products((layer,)) as count:
        y, dx = results(layer, x, dy)
    assert count == 1
    weight = layer.weight.t() if kind == "Conv1D" else layer.weight
    assert_rounded_sums(y, x, weight, layer.bias)
    assert_rounded_sums(dx, dy, weight.t())


@pytest.mark.parametrize("stride", ["transposed", "sliced", "expanded", "every other"])
def test_strides_of_the_input_and_of_its_gradient_do_not_matter(stride: str) -> None:
    views = {
        "transposed": lambda n: torch.randn(4, n, 3).transpose(1, 2),
        "sliced": lambda n: torch.randn(4, 6, n)[:, 2:5],
        "expanded": lambda n: torch.randn(n).expand(4, 3, n),
        "every other": lambda n: torch.randn(4, 3, 2 * n)[..., ::2],
    }
    layer, make = linear(24, 40), views[stride]
    x, dy = make(24), make(40)
    with fast_products((layer,)):
        y, dx = results(layer, x, dy)
    assert_rounded_sums(y, x, layer.weight, layer.bias)
    assert_rounded_sums(dx, dy, layer.weight.t())


def test_no_rows_are_no_products() -> None:
    layer = linear(8, 5)
    with fast_products((layer,)):
        y, dx = results(layer, torch.zeros(0, 3, 8), torch.zeros(0, 3, 5))
    assert (y.shape, dx.shape) == ((0, 3, 5), (0, 3, 8))


def test_two_products_agree_bit_for_bit() -> None:
    layer, x, dy = linear(64, 48), torch.randn(7, 64), torch.randn(7, 48)
    with fast_products((layer,)):
        first, second = (results(layer, x, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Subclass(nn.Linear):
    """Another library's layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Linear(nn.Linear):
    """Another library's layer, of the same name."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Conv1D2(Conv1D):
    """A subclass of GPT-2's layer."""


def on_instance(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda input: 2 * F.linear(input, layer.weight, layer.bias)  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    layer = linear(8, 5)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer.requires_grad_(False)


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear(8, 5)).requires_grad_(False)


OTHERS = {
    "float64": lambda: linear(8, 5).double(),
    "bfloat16": lambda: linear(8, 5).bfloat16(),
    "learned": lambda: linear(8, 5).requires_grad_(),
    "subclass": lambda: Subclass(8, 5).requires_grad_(False),
    "subclass of that name": lambda: Linear(8, 5).requires_grad_(False),
    "subclass of Conv1D": lambda: Conv1D2(5, 8).requires_grad_(False),
    "forward on the instance": lambda: on_instance(linear(8, 5)),
    "pruned": pruned,
    "weight norm": normed,
    "meta": lambda: linear(8, 5).to("meta"),
    "no linear layer": lambda: nn.LayerNorm(8).requires_grad_(False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers_keep_what_they_have(kind: str) -> None:
    layer = OTHERS[kind]()
    with fast_products((layer,)) as count:
        assert count == 0
        if kind not in ("meta", "pruned", "weight norm"):
            x = torch.randn(3, 8, dtype=next(layer.parameters()).dtype)
            inside = layer(x)
            assert torch.equal(inside, type(layer).forward(layer, x) if kind != "forward on the instance" else inside)


def test_a_patched_layer_is_still_one() -> None:
    model = tiny.llama().requires_grad_(False)
    with af.patch(model, af.ActivScalar.for_model(model)), fast_products(tuple(model.model.layers)) as count:
        assert count == 3 * 7


def test_autocast_and_other_dtypes_go_the_usual_way() -> None:
    layer, x = linear(8, 5), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with fast_products((layer,)):
            assert torch.equal(layer(x), expected)
    assert expected.dtype == torch.bfloat16


def test_hooks_of_a_layer_still_run() -> None:
    layer = linear(8, 5)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(3, 8)
    expected = layer(x)
    with fast_products((layer,)):
        torch.testing.assert_close(layer(x), expected)


def test_everything_is_restored_also_after_an_exception() -> None:
    model = tiny.llama().requires_grad_(False)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with fast_products(tuple(model.model.layers)) as count:
        assert count == 3 * 7
    with pytest.raises(KeyboardInterrupt), fast_products(tuple(model.model.layers)):
        raise KeyboardInterrupt
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_a_models_gradients_are_the_same_to_rounding() -> None:
    model = tiny.llama().requires_grad_(False)
    embeds = torch.randn(2, 6, 32)

    def gradient(kind: torch.dtype) -> Tensor:
        x = embeds.to(kind).requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=x).logits.square().mean(), x)[0]

    baseline = gradient(torch.float32)
    with fast_products(tuple(model.model.layers)):
        found = gradient(torch.float32)
    model.double()
    exact = gradient(torch.float64)
    scale = exact.abs().max().item()
    assert (found - exact).abs().max().item() <= 2 * (baseline - exact).abs().max().item() + 1e-6 * scale
