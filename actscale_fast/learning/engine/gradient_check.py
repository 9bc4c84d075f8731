"""The engine on trial: two prompts through all of its shortcuts, against the plain whole model.

The plain way is one forward pass per prompt of the patched model, unpadded, without cache, to its logits, and autograd
back. It is itself held against a central difference: a model whose layers compute without a backward (weights that a
quantiser repacks, an output that is detached) has a gradient that is wrong, and no fit.

What is compared is E + F at a margin that no logit difference reaches, so that the hinge is linear; at the parameters
that a fit begins with, and a small step away from them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.layout import layout
from ...frozen.batching import Batch, forward_arguments
from ...interventions import Intervention
from ...modules.evaluation_mode import frozen
from ...modules.hooks import first_of, with_first
from ...modules.without_side_effects import lock, unhooked
from ...patching.patch import AnyPatch, patch
from ..encoded_examples import EncodedExamples
from ..objective import Objective

#: Beyond every logit difference.
MARGIN = 100.0
#: By how much the loss changes in the small step, to first order; in 16 bits rounding would drown less.
_CHANGE = {torch.bfloat16: 0.5, torch.float16: 0.5}
#: The longest step, in units of the parameters.
_LONGEST = 0.05
#: Engine against plain model: relative distance of the gradients.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 0.4, torch.float16: 0.1}


class GradientError(RuntimeError):
    """The model itself has no gradient that anything can be learned from."""


@dataclass(frozen=True)
class Point:
    """The loss and its gradient at some parameters."""

    loss: float
    gradients: list[Tensor]


class Trial:
    """What the plain whole model says of two prompts.

    Args:
        model: plain or compiled; the one inside runs.
        data: the examples.
        intervention: what is learned.
        patched: its patch, alone or among others.
        group: of a stacked intervention, whose parameters are tried; else None.
        objective: gives directions, KL and whether answers are excluded.

    """

    def __init__(
        self, model: nn.Module, data: EncodedExamples, intervention: Intervention, patched: AnyPatch,
        group: int | None, objective: Objective,
    ) -> None:  # fmt: skip
        self.model, self.data, self.patched, self.group = model, data, patched, group
        self.objective = replace(objective, margin=MARGIN, faithfulness=1.0, minimality=0.0)
        self.parameters = [value for value in intervention.parameters() if value.requires_grad]
        self.rows = _two_rows(data)
        self.dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with lock, torch.compiler.set_stance("force_eager"):
            with torch.no_grad():  # first, as the engine does: some quantised layers have no backward afterwards
                self.references = {row: self._logits(self._ids(row), [0.0]) for row in self.rows}
            with self._watching_for_lost_gradients():
                self.start = self._point()
            self.step = self._step()
            with self._moved(1.0):
                self.moved = self._point()

    def check_gradient(self) -> None:
        """Hold the plain gradient against a central difference.

        Raises:
            GradientError: the two disagree where precision lets that be seen, or a module that the loss depends on
                computes an output without a gradient.
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
        # Where experts change in between, a shorter step tells; where activations are quantised, a longer one.
        quantised = _is_quantised(self.model)
        for part in (1.0, 8.0, 4.0) if quantised else (1.0, 0.125, 0.015625):
            measured, curved = self._difference(part)
            rounding = 256 * torch.finfo(torch.float32).eps * max(1.0, abs(self.start.loss - self._hinges()))
            predicted = 2 * part * slope
            slack = 0.25 * max(abs(measured), abs(predicted)) + curved if quantised else 0.05 * abs(measured)
            if abs(measured - predicted) <= slack + rounding:
                return
        raise GradientError(
            f"model: the gradient of {type(self.model).__name__} is not that of its forward pass (a step changes the "
            f"loss by {measured:.3g}, the gradient says {predicted:.3g}), so nothing can be learned; is a layer "
            "quantised, detached or of a kernel without a backward?"
        )

    @property
    def finite(self) -> bool:
        """Whether the loss and its gradients are numbers at both points."""
        points = (self.start, self.moved)
        losses = all(math.isfinite(point.loss) for point in points)
        return losses and all(bool(g.isfinite().all()) for point in points for g in point.gradients)

    def _difference(self, part: float) -> tuple[float, float]:
        """(L(a step on) − L(a step back), what the curvature of the three points may hide of it)."""
        losses = []
        for factor in (part, -part):
            if factor == 1.0:
                losses.append(self.moved.loss)
                continue
            with self._moved(factor):
                losses.append(self._loss())
        ahead, back = losses
        return ahead - back, abs(ahead + back - 2 * self.start.loss)

    @torch.no_grad()
    def _matters(self, module: nn.Module) -> bool:
        """Whether the loss depends on a module's output: not so where only an order is read off, as of an indexer."""
        handle = module.register_forward_hook(
            lambda _, args, output: with_first(output, first_of(output) * 1.0625)
        )  # fmt: skip
        try:
            return self._loss() != self.start.loss
        finally:
            handle.remove()

    def disagrees(self, gradients: Callable[[], tuple[Tensor, list[Tensor]]]) -> str | None:
        """How the engine differs from the plain model, or None.

        Args:
            gradients: the engine's terms [1, ≥ 2] and gradients of the two prompts at the present parameters.
        """
        if not self.finite:  # the first step says so, with its number and the term
            return None
        tried = ((self.start, "the parameters that it begins with"), (self.moved, "a step away from them"))
        for point, where in tried:
            with self._moved(1.0 if point is self.moved else 0.0):
                terms, found = gradients()
            loss = float(terms[0, :2].double().sum())
            tolerance = _TOLERANCE.get(self.dtype, 0.4)
            expected = torch.cat([one.double().flatten() for one in point.gradients])
            got = torch.cat([one.double().flatten().to(expected.device) for one in found])
            off, size = float((got - expected).norm()), float(expected.norm())
            scale = max(1.0, abs(point.loss - self._hinges()))
            if not off <= tolerance * max(size, 0.1 * scale):  # a norm after the site may leave nothing but rounding
                return f"its gradient at {where} is off by {off / max(size, 1e-30):.2g} of its norm"
            if not abs(loss - point.loss) <= tolerance * scale + 1e-6 * MARGIN:  # the engine's terms are float32
                return f"its loss at {where} is {loss - self._hinges():.6g}, expected {point.loss - self._hinges():.6g}"
        return None

    def _hinges(self) -> float:
        """What the margin adds to the loss."""
        return MARGIN * len(self.objective.directions)

    @contextlib.contextmanager
    def _moved(self, factor: float) -> Iterator[None]:
        """The parameters `factor` steps from where they are."""
        if factor == 0.0:
            yield
            return
        before = [value.detach().clone() for value in self.parameters]
        try:
            with torch.no_grad():
                for value, step in zip(self.parameters, self.step, strict=True):
                    value.add_(factor * step.to(value.dtype))
            yield
        finally:
            with torch.no_grad():
                for value, there in zip(self.parameters, before, strict=True):
                    value.copy_(there)

    def _step(self) -> list[Tensor]:
        """Along the gradient's signs, as long as changes the loss by a little to first order."""
        total = sum(float(g.double().abs().sum()) for g in self.start.gradients)
        size = min(_CHANGE.get(self.dtype, 0.1) / max(total, 1e-30), _LONGEST)
        return [size * torch.where(g < 0, -1.0, 1.0).double() for g in self.start.gradients]

    def _point(self) -> Point:
        with torch.enable_grad():
            loss = self._total()
            if not loss.requires_grad:
                return Point(float(loss.detach()), [torch.zeros_like(value) for value in self.parameters])
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        return Point(float(loss.detach()), zeros)

    @torch.no_grad()
    def _loss(self) -> float:
        return float(self._total())

    def _total(self) -> Tensor:
        """E + F, a mean over the two prompts, float64."""
        losses = [self._of_prompt(row) for row in self.rows]
        return torch.stack(losses).mean()

    def _of_prompt(self, row: int) -> Tensor:
        directions = self.objective.directions
        ids, reference = self._ids(row), self.references[row].expand(len(directions), -1)
        steered = self._logits(ids.expand(len(directions), -1), [float(sign) for sign in directions])
        answers = (self.data.correct[[row]], self.data.wrong[[row]])
        correct, wrong = (ids.expand(len(directions)).to(steered.device) for ids in answers)
        sign = torch.tensor([float(sign) for sign in directions], dtype=torch.float64, device=steered.device)
        # Written out: float64, and no kernel that the engine uses too.
        z, margin = steered.double(), self.objective.margin
        difference = z.gather(1, correct[:, None])[:, 0] - z.gather(1, wrong[:, None])[:, 0]
        p, q = reference.double(), z
        if self.objective.exclude_answers:
            others = torch.ones_like(z, dtype=torch.bool).scatter_(1, torch.stack([correct, wrong], 1), False)
            p, q = (one[others].view(len(z), -1) for one in (p, q))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        if self.objective.kl == "reverse":
            p, q = q, p
        divergence = (p.exp() * torch.where(p > -torch.inf, p - q, 0.0)).sum(-1)
        return (torch.relu(margin - sign * difference) + divergence).sum()

    def _ids(self, row: int) -> Tensor:
        return torch.tensor([self.data.prompts[row]], device=self.data.device)

    def _logits(self, ids: Tensor, strengths: list[float]) -> Tensor:
        """The last token's logits of each row [R, V] under its strength."""
        model: Any = self.model
        device = self.parameters[0].device
        group = None if self.group is None else torch.full((len(ids),), self.group, device=device)
        self.patched.set_rows(torch.tensor(strengths, dtype=torch.float32, device=device), group)
        batch = Batch(ids, torch.ones_like(ids), padded=False)
        return model(**forward_arguments(model, batch)).logits[:, -1]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _watching_for_lost_gradients(self) -> Iterator[None]:
        """Note the modules with weights whose output has no gradient though their input has one, as `lost`."""
        self.lost: list[nn.Module] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = first_of(output)
            floating = isinstance(first, Tensor) and first.is_floating_point()
            if floating and not first.requires_grad and any(_is_learned(x) for x in (*args, *kwargs.values())):
                self.lost.append(module)

        watched = [one for one in self.model.modules() if _has_weights(one)]
        handles = [module.register_forward_hook(look, with_kwargs=True) for module in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def gradient_on_trial(model: nn.Module, data: EncodedExamples, intervention: Intervention) -> None:
    """Hold the plain model's gradient of a single intervention against its forward passes, on two prompts.

    Raises:
        GradientError: it has none, or another one.
    """
    found = layout(model, intervention.paths)
    with frozen(model), patch(model, intervention) as patched, unhooked(found.model):
        Trial(found.model, data, intervention, patched, None, Objective()).check_gradient()


def _is_quantised(model: nn.Module) -> bool:
    return any(
        not p.is_floating_point() or type(p) not in (Tensor, nn.Parameter)
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None and p.dim() >= 2
    )


def _has_weights(module: nn.Module) -> bool:
    """Whether a module, or one in it, has a matrix; rotary tables and norms have none."""
    tensors = (*module.parameters(), *module.buffers())
    return any(tensor.dim() >= 2 for tensor in tensors) or hasattr(module, "in_features")


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _two_rows(data: EncodedExamples) -> list[int]:
    """The shortest prompt, and the shortest that is longer (else another one, else the same alone)."""
    order = sorted(range(len(data)), key=lambda row: len(data.prompts[row]))
    first = order[0]
    longer = [row for row in order if len(data.prompts[row]) > len(data.prompts[first])]
    return [first, *(longer or order[1:])[:1]]
