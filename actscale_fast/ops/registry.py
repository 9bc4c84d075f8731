"""The ops as PyTorch sees them: schemas, fakes, and what hands each call to a backend's module.

`Library.define`/`impl` costs about half of `torch.library.custom_op` a call. Each backend is a module with the
functions named in `BackendModule`; they take plain tensors, allocate their outputs and know nothing of autograd.
Outputs that are not asked for are empty tensors: the number of outputs never changes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, layout

LIBRARY = torch.library.Library("actscale", "DEF")

SCHEMAS = {
    "scale_heads": "(Tensor x, Tensor? alpha, Tensor? shift, float strength, Tensor? row_strength, Tensor? group)"
    " -> Tensor",
    "scale_heads_backward": "(Tensor dy, Tensor x, Tensor? alpha, Tensor? shift, float strength, Tensor? row_strength,"
    " Tensor? group, bool need_dx, bool need_dalpha, bool need_dshift) -> (Tensor, Tensor, Tensor)",
    "intervention_loss": "(Tensor logits, Tensor reference_logits, Tensor? correct, Tensor? wrong, Tensor? direction,"
    " Tensor? scalars, float margin, float inverse_temperature, bool exclude_answers, bool reverse, bool need_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "intervention_loss_scale_": "(Tensor(a!) grad, Tensor d_effectiveness, Tensor d_faithfulness, Tensor? correct,"
    " Tensor? wrong, Tensor answer_grad) -> ()",
    "proximal_adam_": "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!) step, float lr, float beta1, float beta2, float eps, float l1) -> ()",
}


class BackendModule(Protocol):
    """What `ops/cpu.py` and `ops/triton/` provide."""

    def scale_heads(
        self,
        x: Tensor,  # [B, T, H, D], any strides over B, T, H; unit stride over D
        alpha: Tensor | None,  # [G, P, H] float32 contiguous, P in {1, T}
        shift: Tensor | None,  # [G, P, H, D] float32 contiguous
        strength: float,
        row_strength: Tensor | None,  # [B] float32 contiguous; β of row b = strength · row_strength[b]
        group: Tensor | None,  # [B] int64 contiguous; None: G == 1
    ) -> Tensor:
        """y, laid out as `layout.empty_like(x)`; one rounding from float32. ValueError where D is strided."""

    def scale_heads_backward(
        self,
        dy: Tensor,  # [B, T, H, D], any strides, stride 0 included
        x: Tensor,  # read for dalpha alone, else only what dx is laid out like: any strides
        alpha: Tensor | None,
        shift: Tensor | None,
        strength: float,
        row_strength: Tensor | None,
        group: Tensor | None,
        need_dx: bool,
        need_dalpha: bool,
        need_dshift: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx laid out as `layout.empty_like(x)`, dalpha [G, P, H] float32, dshift [G, P, H, D] float32).

        Sums in a fixed order.
        """

    def intervention_loss(
        self,
        logits: Tensor,  # [N, V], unit stride over V, any row stride
        reference_logits: Tensor,
        correct: Tensor | None,  # [N] int64 contiguous; None: no answers
        wrong: Tensor | None,
        direction: Tensor | None,  # [N] float32 of ±1, contiguous
        scalars: Tensor | None,  # float32 contiguous, any shape
        margin: float,
        inverse_temperature: float,
        exclude_answers: bool,
        reverse: bool,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(effectiveness [N], faithfulness [N], grad [N, V], answer_grad [N, 3], l1 [], sign like scalars).

        grad: d(effectiveness + faithfulness)/dlogits in the logits' dtype, contiguous, the two answer columns summed in
        float32 before rounding. answer_grad: d faithfulness/dz[c], d faithfulness/dz[w], d effectiveness/dz[c] in
        float32 (d effectiveness/dz[w] is minus the last). All but the logits' gradient are float32.
        """

    def intervention_loss_scale_(
        self,
        grad: Tensor,
        d_effectiveness: Tensor,  # [N] float32, any stride
        d_faithfulness: Tensor,
        correct: Tensor | None,
        wrong: Tensor | None,
        answer_grad: Tensor,
    ) -> None:
        """Turns `grad` of upstream 1 into that of the given upstream, in place.

        Rows whose d_faithfulness is 1 are not passed over again: only their two answer columns are rewritten.
        """

    def proximal_adam_(
        self,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        l1: float,
    ) -> None:
        """See `reference.proximal_adam_`; all float32 contiguous."""


@functools.cache
def _module(name: str) -> BackendModule:
    path = {"cpu": ".cpu", "triton": ".triton"}[name]
    return cast(BackendModule, importlib.import_module(path, __package__))


def backend_of(x: Tensor) -> BackendModule:
    """The kernels that serve `x`; the public functions have sent reference calls elsewhere already."""
    name = backends.resolve(x.device, x.dtype)
    if name == "reference":  # the op was called directly, or the backend changed between forward and backward
        name = "cpu" if x.device.type == "cpu" else "triton"
    return _module(name)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys
_plain_keys: set[int] = set()  # the dispatch keys of plain tensors, of every device type that was seen
_seen_devices: set[str] = set()


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` (all of the call) runs now, untraced, on memory that holds their values.

    Then the kernels may be called without PyTorch's dispatcher between; two passes through it cost more than a small
    kernel. The dispatcher is for tracing, modes, tensor subclasses, forward-mode derivatives, and tensors whose values
    are not those in memory: a conjugate or negative view, a zero that has no memory.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or (_dispatch_keys(tensor).raw_repr() not in _plain_keys and not _is_first_plain(tensor))
        ):
            return False
    return True


def _is_first_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is plain and the first of its device type; notes that type's keys, of inference tensors too."""
    device = tensor.device.type
    if device in _seen_devices:
        return False
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain_keys.add(_dispatch_keys(torch.empty(0, device=device)).raw_repr())
    _seen_devices.add(device)
    return _dispatch_keys(tensor).raw_repr() in _plain_keys


def _fake_scale_heads(x, alpha, shift, strength, row_strength, group):  # type: ignore[no-untyped-def]
    return layout.empty_like(x)


def _fake_scale_heads_backward(  # type: ignore[no-untyped-def]
    dy, x, alpha, shift, strength, row_strength, group, need_dx, need_dalpha, need_dshift
):
    empty = x.new_empty(0)
    return (
        layout.empty_like(x) if need_dx else empty,
        torch.empty_like(alpha) if need_dalpha else x.new_empty(0, dtype=torch.float32),
        torch.empty_like(shift) if need_dshift else x.new_empty(0, dtype=torch.float32),
    )


def _fake_intervention_loss(  # type: ignore[no-untyped-def]
    logits, reference_logits, correct, wrong, direction, scalars, margin, inverse_temperature, exclude_answers, reverse,
    need_grad,
):  # fmt: skip
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return (
        rows,
        torch.empty_like(rows),
        logits.new_empty(logits.shape if need_grad else (0,)),
        rows.new_empty((logits.shape[0], 3) if need_grad else (0,)),
        rows.new_empty(() if scalars is not None else (0,)),
        torch.empty_like(scalars) if scalars is not None and need_grad else rows.new_empty(0),
    )


def _fake_in_place(*arguments: object) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "scale_heads": _fake_scale_heads,
    "scale_heads_backward": _fake_scale_heads_backward,
    "intervention_loss": _fake_intervention_loss,
    "intervention_loss_scale_": _fake_in_place,
    "proximal_adam_": _fake_in_place,
}


def _implementation(name: str):  # type: ignore[no-untyped-def]
    def call(*arguments):  # type: ignore[no-untyped-def]
        return getattr(backend_of(arguments[0]), name)(*arguments)

    call.__name__ = name
    return call


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    for _key in ("CPU", "CUDA", "XPU"):
        LIBRARY.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"actscale::{_name}", _FAKES[_name], lib=LIBRARY)
