"""Canaries: what the ops use of PyTorch's private parts is there and means what they take it to mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from actscale_fast.ops.backends import automatic, has_extension
from actscale_fast.ops.torch_internals import graph_is_kept, in_forward_mode, is_eager
from actscale_fast.patching.forward_context import _note_compiled

CHANGED = "PyTorch's private parts have changed, see actscale_fast/ops/torch_internals.py: "


def test_the_private_names_exist() -> None:
    names = [
        "_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_get_tracing_state", "_dispatch_keys",
        "_AutoDispatchBelowAutograd",
    ]  # fmt: skip
    missing = [name for name in names if not hasattr(torch._C, name)]
    assert not missing, CHANGED + f"torch._C has no {', '.join(missing)}"
    assert hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"), CHANGED + "no _get_current_graph_task…"
    assert isinstance(forward_ad._current_level, int), CHANGED + "forward_ad has no _current_level"


@pytest.mark.parametrize("inference", [False, True])
def test_a_plain_call_is_eager(inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(3)
        assert is_eager(x, None, x[:2], torch.nn.Parameter(x), torch.arange(3)), CHANGED + "a plain tensor is not plain"


def test_no_other_call_is_eager() -> None:
    x, seen = torch.ones(3), {}

    def noted(name: str, *tensors: Tensor) -> Tensor:
        seen[name] = is_eager(*tensors)
        return tensors[0] * 1

    torch.vmap(lambda t: noted("vmap", t))(x)
    torch.func.grad(lambda t: noted("func.grad", t).sum())(x)
    make_fx(lambda t: noted("make_fx", t))(x)
    torch.jit.trace(lambda t: noted("jit.trace", t), x, check_trace=False)  # the check runs it untraced
    with forward_ad.dual_level():
        noted("forward mode", x)
        assert in_forward_mode(), CHANGED + "forward mode goes unnoticed"
    with FakeTensorMode():
        noted("fake tensors", torch.ones(3))
    noted("negative view", torch._neg_view(x))
    noted("conjugate view", torch.ones(3, dtype=torch.complex64).conj())
    noted("zero without memory", torch._efficientzerotensor(3))
    noted("subclass", torch.ones(3).as_subclass(type("Sub", (Tensor,), {})))
    eager = [name for name, found in seen.items() if found]
    assert len(seen) == 10
    assert not eager, CHANGED + f"taken for eager: {', '.join(eager)}"


def test_whether_the_graph_is_kept_is_known_in_a_backward_pass() -> None:
    kept = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 1

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            kept.append(graph_is_kept(dy))
            return dy

    x = torch.ones(3, requires_grad=True)
    y = Noting.apply(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert kept == [True, False], CHANGED + "whether a graph is kept is not told"


def test_the_compiler_marks_a_constant_as_this_package_does() -> None:
    def asked() -> int:
        return 3

    torch.compiler.assume_constant_result(asked)
    mark = "_dynamo_marked_constant"
    assert getattr(asked, mark, False) is True, f"torch.compiler.assume_constant_result no longer sets {mark}"
    assert all(getattr(function, mark) is True for function in (automatic, has_extension, _note_compiled))
