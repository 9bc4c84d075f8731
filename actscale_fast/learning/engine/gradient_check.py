"""Checking the engine on two prompts, with all of its shortcuts, against the plain whole model.

The plain model's gradient is itself compared with a central difference: a model whose layers compute without a backward
(weights that a quantiser repacks, an output that is detached) has a wrong gradient, and nothing can be learned. Both
checks are made at the initial parameters and a small step away from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.layout import layout
from ...architectures.sharding import stored_as
from ...interventions import Intervention
from ...modules.evaluation_mode import evaluation_mode
from ...modules.hooks import first_of, with_first
from ...modules.without_side_effects import lock, unhooked
from ...patching.patch import AnyPatch, patch
from ..encoded_examples import EncodedExamples
from ..objective import Objective
from .plain_model import PlainModel

#: Change of the loss in the small step, to first order; in 16 bits, rounding would hide a smaller one.
_CHANGE = {torch.bfloat16: 0.5, torch.float16: 0.5}
#: The longest step, in units of the parameters.
_LONGEST = 0.05
#: Relative distance that is allowed between the gradients of the engine and of the plain model.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 0.4, torch.float16: 0.1}


class GradientError(RuntimeError):
    """The model has no gradient that anything can be learned from."""


class GradientCheck:
    """The plain model's loss and gradients, and what they are compared with.

    Args:
        model, data, intervention, patched, group, objective, recompute: as for `PlainModel`.
    """

    def __init__(
        self, model: nn.Module, data: EncodedExamples, intervention: Intervention, patched: AnyPatch,
        group: int | None, objective: Objective, recompute: bool | str = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with lock, torch.compiler.set_stance("force_eager"):
            self.plain = PlainModel(model, data, intervention, patched, group, objective, recompute)
            with _recording_lost_gradients(model) as self.lost:
                self.start = self.plain.loss_and_gradients()
            self.step = self._small_step()
            with self.plain.moved(self.step, 1.0):
                self.after = self.plain.loss_and_gradients()
        self.rows, self.objective = self.plain.rows, self.plain.objective
        self.finite = self.start.finite and self.after.finite

    def check_plain_gradient(self) -> None:
        """Compare the plain gradient with a central difference.

        Raises:
            GradientError: the two differ by more than precision explains, or a module that the loss depends on computes
                an output without a gradient.
        """
        for module in {type(module): module for module in self.lost}.values():
            if self._matters(module):
                name = next((name for name, other in self.model.named_modules() if other is module), "?")
                raise GradientError(
                    f"model: {name}, a {type(module).__name__}, computes an output without a gradient from an input "
                    "that has one, so nothing can be learned through it; load the model with weights that have a "
                    "backward"
                )
        if self.dtype not in (torch.float32, torch.float64) or not self.finite:
            return
        slope = sum(float((g.double() * s).sum()) for g, s in zip(self.start.gradients, self.step, strict=True))
        # If the choice of experts changes in between, a shorter step tells; if activations are quantised, a longer one.
        quantised = _is_quantised(self.model)
        for part in (1.0, 8.0, 4.0) if quantised else (1.0, 0.125, 0.015625):
            measured, curved = self._difference(part)
            rounding = 256 * torch.finfo(torch.float32).eps * max(1.0, abs(self.start.loss - self.plain.hinges))
            predicted = 2 * part * slope
            slack = 0.25 * max(abs(measured), abs(predicted)) + curved if quantised else 0.05 * abs(measured)
            if abs(measured - predicted) <= slack + rounding:
                return
        raise GradientError(
            f"model: the gradient of {type(self.model).__name__} is not that of its forward pass (a step changes the "
            f"loss by {measured:.3g}, the gradient says {predicted:.3g}), so nothing can be learned; is a layer "
            "quantised, detached or computed by a kernel without a backward?"
        )

    def disagreement(self, gradients: Callable[[], tuple[Tensor, list[Tensor]]]) -> str | None:
        """How the engine differs from the plain model, or None if it agrees.

        Args:
            gradients: the engine's terms [1, ≥ 2] and gradients for the two prompts at the current parameters.
        """
        if not self.finite:  # the first step raises an error with its number and the term
            return None
        hinges = self.plain.hinges
        for expected, factor, where in (
            (self.start, 0.0, "the initial parameters"), (self.after, 1.0, "a step away from the initial parameters"),
        ):  # fmt: skip
            with self.plain.moved(self.step, factor):
                terms, found = gradients()
            loss = float(terms[0, :2].double().sum())
            tolerance = _TOLERANCE.get(self.dtype, 0.4)
            wanted = torch.cat([one.double().flatten() for one in expected.gradients])
            got = torch.cat([one.double().flatten().to(wanted.device) for one in found])
            error, size = float((got - wanted).norm()), float(wanted.norm())
            scale = max(1.0, abs(expected.loss - hinges))
            if not error <= tolerance * max(size, 0.1 * scale):  # if a norm follows the site, it may be all rounding
                return f"its gradient at {where} is off by {error / max(size, 1e-30):.2g} of its norm"
            allowed = tolerance * scale + 1e-6 * self.plain.margin  # the engine's terms are float32
            if not abs(loss - expected.loss) <= allowed:
                return f"its loss at {where} is {loss - hinges:.6g}, expected {expected.loss - hinges:.6g}"
        return None

    def _small_step(self) -> list[Tensor]:
        """A step along the signs of the gradient that changes the loss a little, to first order."""
        total = sum(float(g.double().abs().sum()) for g in self.start.gradients)
        size = min(_CHANGE.get(self.dtype, 0.1) / max(total, 1e-30), _LONGEST)
        return [size * torch.where(g < 0, -1.0, 1.0).double() for g in self.start.gradients]

    def _difference(self, part: float) -> tuple[float, float]:
        """(L(a step ahead) − L(a step back), how much of it curvature may explain)."""
        losses = []
        for factor in (part, -part):
            if factor == 1.0:
                losses.append(self.after.loss)
                continue
            with self.plain.moved(self.step, factor):
                losses.append(self.plain.loss())
        ahead, back = losses
        return ahead - back, abs(ahead + back - 2 * self.start.loss)

    @torch.no_grad()
    def _matters(self, module: nn.Module) -> bool:
        """Whether the loss depends on a module's output, rather than only on its order, as for an indexer."""
        handle = module.register_forward_hook(lambda _, args, output: with_first(output, first_of(output) * 1.0625))
        try:
            return self.plain.loss() != self.start.loss
        finally:
            handle.remove()


def check_gradient(model: nn.Module, data: EncodedExamples, intervention: Intervention) -> None:
    """Compare the plain model's gradient of a single intervention with its forward passes, on two prompts.

    Raises:
        GradientError: there is no gradient, or a wrong one.
    """
    found = layout(model, intervention.paths)
    with evaluation_mode(model), patch(model, intervention) as patched, unhooked(found.model):
        GradientCheck(found.model, data, intervention, patched, None, Objective()).check_plain_gradient()


@contextlib.contextmanager
def _recording_lost_gradients(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Record the modules with weights whose output has no gradient although their input has one."""
    lost: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = first_of(output)
        floating = isinstance(first, Tensor) and first.is_floating_point()
        if floating and not first.requires_grad and any(_needs_gradient(x) for x in (*args, *kwargs.values())):
            lost.append(module)

    handles = [
        module.register_forward_hook(look, with_kwargs=True) for module in model.modules() if _has_matrix(module)
    ]
    try:
        yield lost
    finally:
        for handle in handles:
            handle.remove()


def _is_quantised(model: nn.Module) -> bool:
    return any(
        stored_as(p) == "packed" or not p.is_floating_point()
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None and p.dim() >= 2
    )


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module or one inside it has a matrix, unlike rotary tables and norms."""
    tensors = (*module.parameters(), *module.buffers())
    return any(tensor.dim() >= 2 for tensor in tensors) or hasattr(module, "in_features")


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
