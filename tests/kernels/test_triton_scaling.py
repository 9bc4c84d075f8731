"""The Triton kernels of the scaling against the float64 formulas, called as the registry calls them.

Without a GPU the kernels run in Triton's interpreter; with one, the same claims are checked on real tensors.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, Inputs, assert_as_exact_as_eager

pytest.importorskip("triton", reason="Triton is not installed")

from triton_cases import NEEDS, SCALES, moved, scale_and_gradients, scale_case

from actscale_fast.ops import triton as kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in the interpreter
]


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_and_its_gradients_match_the_formulas(
    inputs: Inputs, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    case = scale_case(inputs, name, dtype)
    dy = inputs.normal(*case["x"].shape, dtype=dtype)
    here = moved(case, device)
    y = kernels.scale_heads(**here)
    needs = (True, case["alpha"] is not None, case["shift"] is not None)
    got = [y, *kernels.scale_heads_backward(dy.to(device), **here, **dict(zip(NEEDS, needs, strict=True)))]
    exact, eager = scale_and_gradients(case, dy, torch.float64), scale_and_gradients(case, dy, torch.float32)
    size = scale_and_gradients(
        {k: v.abs() if k in ("x", "alpha", "shift", "row_strength") and v is not None else v for k, v in case.items()}
        | {"strength": abs(case["strength"])}, dy.abs(), torch.float64,
    )  # fmt: skip
    for label, value, right, plain, condition in zip(
        ("y", "dx", "dalpha", "dshift"), got, exact, eager, size, strict=True
    ):
        if right is not None:
            assert plain is not None
            assert condition is not None
            # 4: a sum of a few hundred terms in another order than eager's, which may have been lucky
            assert_as_exact_as_eager(label, value, right, plain, condition=4 * condition)
    for need in [(True, False, False), (False, *needs[1:]), (False, needs[1], False)]:
        again = kernels.scale_heads_backward(dy.to(device), **here, **dict(zip(NEEDS, need, strict=True)))
        for value, full, wanted in zip(again, got[1:], need, strict=True):
            assert torch.equal(value, full) if wanted else value.numel() == 0


def test_any_layout_of_rows_tokens_and_heads_gives_the_same_bits(inputs: Inputs, device: torch.device) -> None:
    case = moved(scale_case(inputs, "positions_and_groups", torch.float32), device)
    dy = inputs.normal(*case["x"].shape).to(device)
    x = case["x"]
    plain = [kernels.scale_heads(**case), *kernels.scale_heads_backward(dy, **case, **dict.fromkeys(NEEDS, True))]
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = torch.full((*x.shape[:3], x.shape[3] + 3), float("nan"), device=device)[..., 1 : x.shape[3] + 1].copy_(x)
    for other in (heads_first, gaps, x.flip(0).clone().flip(0)):
        again = {**case, "x": other}
        y = kernels.scale_heads(**again)
        dx, dalpha, dshift = kernels.scale_heads_backward(dy, **again, **dict.fromkeys(NEEDS, True))
        assert y.stride() == torch.empty_like(other).stride() == dx.stride()
        assert all(torch.equal(a, b) for a, b in zip(plain, (y, dx, dalpha, dshift), strict=True))


def test_an_expanded_gradient_is_read_as_it_lies(inputs: Inputs, device: torch.device) -> None:
    case = moved(scale_case(inputs, "one_scalar_a_head", torch.float32), device)
    expanded = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0, 3.0, 1.5, 0.25]], device=device).expand(case["x"].shape)
    needs = {"need_dx": True, "need_dalpha": True, "need_dshift": False}
    assert expanded.stride()[:3] == (0, 0, 0)
    for a, b in zip(
        kernels.scale_heads_backward(expanded, **case, **needs),
        kernels.scale_heads_backward(expanded.contiguous(), **case, **needs),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-1, 2, 2**40, -(2**40)])
@pytest.mark.parametrize("has", [(True, True), (True, False), (False, True)])
def test_a_group_out_of_range_makes_its_row_nan_and_no_other(
    inputs: Inputs, device: torch.device, bad: int, has: tuple[bool, bool]
) -> None:
    case = moved(scale_case(inputs, "positions_and_groups", torch.float32), device)
    case |= {name: case[name] if there else None for name, there in zip(("alpha", "shift"), has, strict=True)}
    dy = torch.ones_like(case["x"])
    needs = {"need_dx": True, "need_dalpha": has[0], "need_dshift": has[1]}
    y, dx = kernels.scale_heads(**case), kernels.scale_heads_backward(dy, **case, **needs)[0]
    case["group"] = case["group"].clone()
    case["group"][1] = bad
    bad_y, (bad_dx, *sums) = kernels.scale_heads(**case), kernels.scale_heads_backward(dy, **case, **needs)
    assert bad_y[1].isnan().all()
    assert bad_dx[1].isnan().all()
    assert torch.equal(bad_y[[0, 2]], y[[0, 2]])
    assert torch.equal(bad_dx[[0, 2]], dx[[0, 2]])
    assert all(total.isfinite().all() for total in sums)


def test_an_empty_batch_has_zero_sums(inputs: Inputs, device: torch.device) -> None:
    alpha, shift = inputs.normal(2, 1, 3).to(device), inputs.normal(2, 1, 3, 4).to(device)
    x = torch.empty(0, 5, 3, 4, device=device)
    group = torch.empty(0, dtype=torch.int64, device=device)
    assert kernels.scale_heads(x, alpha, shift, 1.0, None, group).shape == x.shape
    _, dalpha, dshift = kernels.scale_heads_backward(x, x, alpha, shift, 1.0, None, group, True, True, True)
    assert (dalpha == 0).all()
    assert dalpha.shape == alpha.shape
    assert (dshift == 0).all()
    assert dshift.shape == shift.shape
