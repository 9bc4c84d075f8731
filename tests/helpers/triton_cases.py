"""What the tests of the Triton kernels share: calls with the registry's arguments, and the formulas beside them."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import Inputs, Rows, assert_as_exact_as_eager, textbook_losses
from torch import Tensor

from actscale_fast.ops import reference, triton as kernels


def loss_of(rows: Rows, scalars: Tensor | None = None, need_grad: bool = True, **options: Any) -> tuple[Tensor, ...]:
    answers = options.pop("answers", True)
    return kernels.intervention_loss(
        rows.logits,
        rows.reference,
        *((rows.correct, rows.wrong, rows.direction) if answers else (None, None, None)),
        scalars,
        options.get("margin", 1.0),
        options.get("inverse_temperature", 1.0),
        options.get("exclude_answers", True),
        options.get("reverse", False),
        need_grad,
    )


def exact_loss(
    rows: Rows, dtype: torch.dtype, upstream: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(effectiveness, faithfulness, gradient) of `reference`, computed in `dtype` on the CPU."""
    cpu = rows.to(torch.device("cpu"))
    answers = (cpu.correct, cpu.wrong, cpu.direction) if options.pop("answers", True) else (None, None, None)
    z = cpu.logits.to(dtype).requires_grad_()
    e, f = reference.intervention_loss(z, cpu.reference.to(dtype), *answers, **options)
    d_e, d_f = (torch.ones_like(e), torch.ones_like(f)) if upstream is None else (u.cpu().to(dtype) for u in upstream)
    (gradient,) = torch.autograd.grad((e * d_e + f * d_f).sum(), z)
    return e.detach(), f.detach(), gradient


def assert_losses_match(got: tuple[Tensor, ...], rows: Rows, **options: Any) -> None:
    exact, eager = exact_loss(rows, torch.float64, **options), exact_loss(rows, torch.float32, **options)
    ones = torch.ones(len(rows.logits))
    condition = textbook_losses(
        rows, (ones, ones), torch.float64, exclude_answers=options.get("exclude_answers", True),
        kl="reverse" if options.get("reverse") else "forward", temperature=1 / options.get("inverse_temperature", 1.0),
        answers=options.get("answers", True),
    )  # fmt: skip
    assert_as_exact_as_eager("effectiveness", got[0], exact[0], eager[0], condition=rows.logits.abs().max().double())
    # 1: the sums of exponentials, whose ratio's logarithm is a term, are at least 1 and float32
    assert_as_exact_as_eager("faithfulness", got[1], exact[1], eager[1], condition=4 * condition.value_condition)
    assert_as_exact_as_eager("gradient", got[2], exact[2], eager[2], condition=4 * condition.gradient_condition)


SCALES = {
    "one_scalar_a_head": ((2, 7, 3, 8), 1, False, (True, False)),
    "positions_and_groups": ((3, 5, 4, 16), 2, True, (True, True)),
    "shift_alone": ((2, 6, 2, 5), 1, False, (False, True)),
    "row_by_row": ((3, 4, 2, 80), 3, False, (True, True)),
    "one_wide_site": ((2, 3, 1, 2100), 1, False, (True, True)),
    "many_heads": ((1, 2, 70, 64), 1, False, (True, False)),
    "one_channel": ((2, 5, 3, 1), 2, False, (True, True)),
    "one_token": ((4, 1, 5, 12), 2, False, (True, True)),
    "many_positions": ((2, 40, 2, 3), 2, False, (True, True)),
}
NEEDS = ("need_dx", "need_dalpha", "need_dshift")


def scale_case(inputs: Inputs, name: str, dtype: torch.dtype) -> dict[str, Any]:
    (B, T, H, D), G, by_position, (has_alpha, has_shift) = SCALES[name]
    P = T if by_position else 1
    group = inputs.integers(G, B) if G > 1 and name != "row_by_row" else None
    return {
        "x": inputs.normal(B, T, H, D, dtype=dtype),
        "alpha": inputs.normal(G, P, H) if has_alpha else None,
        "shift": inputs.normal(G, P, H, D) if has_shift else None,
        "strength": -1.5,
        "row_strength": inputs.normal(B) if name != "shift_alone" else None,
        "group": group,
    }


def scale_and_gradients(case: dict[str, Any], dy: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """[y, dx, dalpha, dshift] of `reference`, computed in `dtype` on the CPU."""
    leaves = {k: case[k].to(dtype).requires_grad_() for k in ("x", "alpha", "shift") if case[k] is not None}
    rest = {k: case[k] for k in case if k not in leaves}
    y = reference.scale_heads(**leaves, **rest)
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))
    return [y.detach(), *(gradients.get(k) for k in ("x", "alpha", "shift"))]


def moved(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.items()}
