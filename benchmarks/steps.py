"""A step of one fit or of several by this package, its yardsticks, and the work that all ways of a step share.

Every way starts from the same scalars at each call and returns the terms and gradients of all fits, so that calls are
equal and can be checked: (effectiveness [G], faithfulness [G], gradient of E + λ_F·F [G, L, 1, H]). The frozen model's
reference is made once, before the clock runs, in all of them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.frozen.batching import next_token_logits
from actscale_fast.learning.encoded_examples import EncodedExamples
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.execution import Execution
from actscale_fast.learning.fit_settings import FitSettings
from actscale_fast.learning.fit_state import FitState

from .case import Variant, kernel_backends

LR, BETAS = 0.03, (0.9, 0.99)

Results = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """What is fitted, to what: G fits of one model, each with its own prompts, start and weight of the ℓ1 norm."""

    model: Any
    data: EncodedExamples
    rows: list[list[int]]  # of the examples, for each fit
    starts: Tensor  # [G, L, 1, H], the scalars of each fit
    minimality: list[float]  # λ_M of each fit
    layers: tuple[int, ...]
    last_only: bool = False  # the last token of each prompt alone is steered

    @property
    def objectives(self) -> list[af.Objective]:
        return [af.Objective(minimality=weight) for weight in self.minimality]

    @property
    def tokens(self) -> int:
        """Those that one plain step of all fits runs, padding included."""
        return sum(2 * self.data.batch(rows).input_ids.numel() for rows in self.rows)


class Ours:
    """A step of every fit by the engine of `fit`, one after another; the engine stays open until `resources` close.

    Args:
        together: all fits in one step of the engine, as `sweep` runs them.
        capture: its passes as CUDA graphs.
    """

    def __init__(
        self, work: Work, resources: contextlib.ExitStack, *, together: bool = False, capture: bool = False
    ) -> None:
        model = twin(work.model)
        positions = [-1] if work.last_only else None
        single = af.ActivScalar.for_model(model, layers=work.layers, positions=positions)
        self.starts = work.starts.to(single.device)
        settings = FitSettings(steps=1 << 30, lr=LR, betas=BETAS, schedule="constant", batch_size=1 << 30)
        objectives = work.objectives
        self.states = []
        for objective, rows in zip(objectives, work.rows, strict=True):
            own = copy.deepcopy(single) if together else single
            self.states.append(FitState(own, objective, settings, rows))
        self.together = together
        self.intervention = af.ActivScalar.stack([state.intervention for state in self.states]) if together else single
        engine = Engine(model, work.data, self.intervention, objectives, Execution(capture=capture))
        self.engine = resources.enter_context(engine)

    def __call__(self) -> Results:
        return self._all_together() if self.together else self._in_turn()

    def _in_turn(self) -> Results:
        made = []
        for state, start in zip(self.states, self.starts, strict=True):
            state.values[0].data.copy_(start)
            terms, gradients = self.engine.gradients([FitRequest(state.rows(), state.objective)])
            state.update(terms[0], gradients)
            made.append((terms[0], gradients[0]))
        terms = torch.stack([one for one, _ in made])
        return terms[:, 0], terms[:, 1], torch.stack([one for _, one in made])

    def _all_together(self) -> Results:
        requests = []
        for group, (state, start) in enumerate(zip(self.states, self.starts, strict=True)):
            state.values[0].data.copy_(start)
            self.intervention.get_parameter("alpha").data[group].copy_(state.values[0].data)
            requests.append(FitRequest(state.rows(), state.objective, group))
        terms, (gradient,) = self.engine.gradients(requests)
        for group, state in enumerate(self.states):
            state.update(terms[group], [gradient[group]])
        return terms[:, 0], terms[:, 1], gradient


def engine_variants(
    work: Work, resources: contextlib.ExitStack, suffix: str = "", *, together: bool = False
) -> list[Variant]:
    """The step of the engine with every backend of the device; on a GPU also captured, an engine for each graph."""
    variants = []
    for name in kernel_backends(work.data.device):
        for capture in (False, True) if work.data.device.type == "cuda" else (False,):
            step = Ours(work, resources, together=together, capture=capture)
            label = f"actscale_fast {name}{suffix}{', CUDA graphs' if capture else ''}"
            variants.append(Variant(label, step, name))
    return variants


def twin(model: Any) -> Any:
    """A copy of the modules around the same weights: what an engine does to one is not seen by the other."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def products(work: Work) -> Callable[[], tuple[Tensor, ...]]:
    """PyTorch's matrix products of the padded batch under both directions: every linear layer's, the head's with the
    last tokens alone, and the one each that carries the gradient back to the layer's input."""
    sizes: list[tuple[int, Tensor]] = []
    head = work.model.get_output_embeddings()
    for rows in work.rows:
        prompts, tokens = work.data.batch(rows).input_ids.shape
        for module in work.model.modules():
            if isinstance(module, nn.Linear):
                sizes.append((2 * prompts * (1 if module is head else tokens), module.weight))  # [out, in]
            elif type(module).__name__ == "Conv1D":  # transformers' own, for GPT-2
                sizes.append((2 * prompts * tokens, module.weight.t()))
    inputs = {(n, width): torch.ones(n, width, device=w.device, dtype=w.dtype) for n, w in sizes for width in w.shape}

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        for n, weight in sizes:
            F.linear(inputs[n, weight.shape[1]], weight)
            torch.matmul(inputs[n, weight.shape[0]], weight)
        return ()

    return call


def losses(work: Work) -> Callable[[], tuple[Tensor, ...]]:
    """Our losses of the first fit's last hidden states and their gradient: what of a step is not the model's own."""
    rows, objective = work.rows[0], work.objectives[0]
    head = work.model.get_output_embeddings()
    kept: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0][:, -1]))
    try:
        with torch.no_grad():
            next_token_logits(work.model, work.data.batch(rows))
    finally:
        hook.remove()
    weight = head.weight.detach()
    answers = [ids[rows] for ids in (work.data.correct, work.data.wrong)]
    reference = ops.reference_statistics(kept[0], weight, *answers)
    hidden = kept[0].repeat(2, 1)
    hidden = (hidden + 0.01 * hidden.roll(1, 0)).requires_grad_()
    signs = [sign for sign in (1.0, -1.0) for _ in rows]
    direction = torch.tensor(signs, device=hidden.device)
    twice = torch.arange(len(rows), device=hidden.device).repeat(2)

    def call() -> tuple[Tensor, ...]:
        effectiveness, faithfulness = ops.linear_intervention_loss(
            hidden, weight, reference[twice], *(ids[twice] for ids in answers), direction=direction,
            margin=objective.margin,
        )  # fmt: skip
        loss = effectiveness.sum() + objective.faithfulness * faithfulness.sum()
        return torch.autograd.grad(loss, hidden)

    return call
