"""scale_heads on few tokens on a CPU, with nothing to learn: `auto` computes it as plain PyTorch, below all checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import Inputs, error_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actscale_fast import ops
from actscale_fast.ops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    with ops.use_backend("auto"):
        yield


class _Names(TorchDispatchMode):
    """The ops that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.name()))
        return func(*args, **(kwargs or {}))


def names_of(x: Tensor, alpha: Tensor | None, **options: Any) -> list[str]:
    with _Names() as mode:
        ops.scale_heads(x, alpha, **options)
    return mode.names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, -1.0, 0.0, 0.3, -2.7])
def test_it_gives_the_bits_of_the_kernel(dtype: torch.dtype, strength: float, inputs: Inputs) -> None:
    alpha = inputs.normal(1, 1, 9)
    for x in (inputs.normal(3, 2, 9, 64, dtype=dtype), inputs.normal(3, 2, 18, 64, dtype=dtype)[:, :, 4:13]):
        with torch.no_grad():
            assert "aten::mul.Tensor" in names_of(x, alpha, strength=strength)
            short = ops.scale_heads(x, alpha, strength=strength)
            backend = "cpu" if backends.has_extension() else "reference"
            with ops.use_backend(backend):  # type: ignore[arg-type]
                assert torch.equal(short, ops.scale_heads(x, alpha, strength=strength))
        assert short.dtype == dtype


def test_scalars_that_change_in_place_take_effect_in_the_next_call(inputs: Inputs) -> None:
    x, alpha = inputs.normal(1, 1, 2, 4), torch.nn.Parameter(torch.zeros(1, 1, 2))
    with torch.no_grad():
        assert torch.equal(ops.scale_heads(x, alpha), x)
        alpha.data.fill_(-1.0)  # raises no version
        assert not ops.scale_heads(x, alpha).any()


@pytest.mark.skipif(not backends.has_extension(), reason="the extension was not built")
def test_every_other_call_goes_to_the_op(inputs: Inputs) -> None:
    op = "actscale::scale_heads"
    x, alpha = inputs.normal(2, 1, 3, 8), inputs.normal(1, 1, 3)
    with torch.no_grad():
        assert op not in names_of(x, alpha)
        assert op in names_of(inputs.normal(2, 1 << 10, 3, 8), alpha)
        assert op in names_of(x, alpha, shift=inputs.normal(1, 1, 3, 8))
        assert op in names_of(x, alpha, group=torch.tensor([0, 0]))
        assert op in names_of(x, alpha, strength=torch.ones(2))
        assert op in names_of(x, alpha.double())
        with ops.use_backend("cpu"):
            assert op in names_of(x, alpha)
    assert op in names_of(x, alpha.clone().requires_grad_())


def test_a_gradient_is_not_lost(inputs: Inputs) -> None:
    x, alpha = inputs.normal(2, 1, 3, 8), inputs.normal(1, 1, 3).requires_grad_()
    assert ops.scale_heads(x, alpha).requires_grad
    assert ops.scale_heads(x.requires_grad_(), alpha.detach()).requires_grad
    with torch.no_grad():
        assert not ops.scale_heads(x, alpha).requires_grad


def test_wrong_arguments_are_refused_as_in_other_calls(inputs: Inputs) -> None:
    x, alpha = inputs.normal(2, 1, 3, 8), inputs.normal(1, 1, 3)

    def message(*arguments: Any, error: type[Exception] = ValueError, **options: Any) -> str:
        with torch.no_grad():
            return error_of(lambda: ops.scale_heads(*arguments, **options), error)

    assert message(x[0], alpha) == "x: got shape (1, 3, 8), expected [B, T, H, D]"
    assert message(x, alpha[..., :2]) == "alpha: got shape (1, 1, 2), expected [G, 1 or 1, 3]"
    assert message(x, alpha, strength=float("nan")) == "strength: got nan, expected a number"
    assert message(x, alpha, strength=True, error=TypeError) == "strength: got bool, expected a number"
    whole = "x: got dtype torch.int64, expected a floating-point tensor [B, T, H, D]"
    assert message(x.long(), alpha, error=TypeError) == whole
    assert message(x, alpha.to("meta")) == "alpha: got a tensor on meta, expected one on cpu"


def test_vmap_and_inference_mode_keep_their_meaning(inputs: Inputs) -> None:
    x, alpha = inputs.normal(4, 2, 1, 3, 8), inputs.normal(1, 1, 3)
    exact = x * (1 + alpha)[..., None]
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda one: ops.scale_heads(one, alpha))(x), exact)
    with torch.inference_mode():
        torch.testing.assert_close(ops.scale_heads(x[0], alpha), exact[0])
