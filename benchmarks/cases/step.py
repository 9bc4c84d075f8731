"""One step of a fit on the demo model, SmolLM2-135M: 16 prompts under both directions, losses, gradient, update.

Beside it the same step as one writes it with PyTorch and transformers alone (hooks on the output projections, a forward
pass a direction with the logits of all tokens, F.kl_div, torch.optim.Adam), and the bare matrix products of ours: what
no kernel of this package can make faster. The frozen model's logits are computed once in both. Asked for by name; takes
minutes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast import ops
from actscale_fast.learning.encoding import Batch, EncodedExamples, next_token_logits

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends

OBJECTIVE = af.Objective()
LR, BETAS = 0.03, (0.9, 0.99)


class Step:
    """What both versions start from: the model, one batch, its answers, and the scalars of a fit under way."""

    def __init__(self, model: nn.Module, data: EncodedExamples, start: Tensor, dtype: torch.dtype) -> None:
        self.model, self.start, self.dtype = model, start.to(data.device, dtype), dtype
        self.batch: Batch = data.batch(range(len(data)))
        self.correct, self.wrong = data.correct, data.wrong
        self.directions = [float(s) for s in OBJECTIVE.directions]
        with torch.no_grad():
            self.reference = next_token_logits(model, self.batch)  # type: ignore[arg-type]


class Plain(Step):
    """The step with hooks, full logits, F.kl_div and Adam."""

    def __init__(self, *given: object, stacked: bool = False) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.stacked = stacked
        self.alpha = self.start.clone().requires_grad_()  # [L, 1, H]
        self.optimizer = torch.optim.Adam([self.alpha], lr=LR, betas=BETAS)
        self.answers = torch.stack([self.correct, self.wrong], -1)
        self.log_p = self._log_probabilities(self.reference)
        batch = self.batch.repeat(len(self.directions)) if stacked else self.batch
        mask = batch.attention_mask
        self.arguments = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
        self.arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.scatter(1, self.answers, torch.finfo(logits.dtype).min).log_softmax(-1)

    def _hook(self, layer: int, strength: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def scale(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            heads = inputs[0].unflatten(-1, (self.alpha.shape[-1], -1))  # [B, T, H, D]
            factor = 1 + strength[:, None] * self.alpha[layer, 0]  # [B or 1, H]
            return ((heads * factor[:, None, :, None]).flatten(-2),)

        return scale

    def _logits(self, strength: Tensor) -> Tensor:
        """The next-token logits under these strengths, one a row or one for all."""
        layers = self.model.model.layers  # type: ignore[union-attr]
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(self._hook(index, strength))  # type: ignore[union-attr]
            for index, layer in enumerate(layers)  # type: ignore[arg-type]
        ]
        try:
            logits: Tensor = self.model(**self.arguments).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return logits

    def __call__(self) -> tuple[Tensor, ...]:
        self.alpha.data.copy_(self.start)
        strengths = torch.tensor(self.directions, device=self.start.device, dtype=self.dtype)
        if self.stacked:
            together = self._logits(strengths.repeat_interleave(len(self.correct))).chunk(len(strengths))
        else:
            together = tuple(self._logits(strength[None]) for strength in strengths)
        terms = []
        for direction, logits in zip(self.directions, together, strict=True):
            chosen = logits.gather(1, self.answers)
            hinge = torch.relu(OBJECTIVE.margin - direction * (chosen[:, 0] - chosen[:, 1])).mean()
            divergence = F.kl_div(self._log_probabilities(logits), self.log_p, reduction="batchmean", log_target=True)
            terms.append(torch.stack([hinge, divergence]))
        effectiveness, faithfulness = torch.stack(terms).sum(0)
        loss = effectiveness + OBJECTIVE.faithfulness * faithfulness
        (gradient,) = torch.autograd.grad(loss, self.alpha)
        self.alpha.grad = gradient + OBJECTIVE.minimality * self.alpha.detach().sign()
        self.optimizer.step()
        return effectiveness.detach(), faithfulness.detach(), gradient


class Ours(Step):
    """The step as `fit` runs it."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.scalars = af.ActivScalar.for_model(self.model)
        self.moments = [torch.zeros_like(self.start) for _ in range(2)]
        self.step = torch.zeros((), device=self.start.device)
        n, times = len(self.correct), len(self.directions)
        self.repeated = self.batch.repeat(times)
        self.ids = [ids.repeat(times) for ids in (self.correct, self.wrong)]
        self.direction = torch.tensor(self.directions, device=self.start.device).repeat_interleave(n)

    def __call__(self) -> tuple[Tensor, ...]:
        alpha, n = self.scalars.alpha, len(self.correct)
        alpha.data.copy_(self.start)
        with af.patch(self.model, self.scalars, strength=self.direction):
            logits = next_token_logits(self.model, self.repeated)  # type: ignore[arg-type]
            losses = ops.intervention_loss(
                logits, self.reference.repeat(len(self.directions), 1), *self.ids, direction=self.direction,
                margin=OBJECTIVE.margin,
            )  # fmt: skip
            effectiveness, faithfulness = (term.sum() / n for term in losses)
            (gradient,) = torch.autograd.grad(effectiveness + OBJECTIVE.faithfulness * faithfulness, alpha)
        ops.proximal_adam_(
            alpha.data,
            gradient,
            self.moments[0],
            self.moments[1],
            self.step,
            lr=LR,
            betas=BETAS,
            l1=OBJECTIVE.minimality,
        )
        return effectiveness.detach(), faithfulness.detach(), gradient


def products(model: nn.Module, batch: Batch, times: int) -> Callable[[], tuple[Tensor, ...]]:
    """Every linear layer's product with its rows, and the one that carries the gradient back."""
    rows, tokens = batch.input_ids.shape
    linear = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sizes = [(times * rows * (1 if name.endswith("lm_head") else tokens), weight) for name, weight in linear]
    inputs = {(n, width): torch.ones(n, width, device=w.device, dtype=w.dtype) for n, w in sizes for width in w.shape}

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        for n, weight in sizes:
            F.linear(inputs[n, weight.shape[1]], weight)
            torch.matmul(inputs[n, weight.shape[0]], weight)
        return ()

    return call


@functools.cache
def demo_model() -> tuple[nn.Module, EncodedExamples, Tensor]:
    model, tokenizer = af.load_demo_model()
    examples = af.tasks.country_capital_conflicts(tokenizer).train[:16]
    start = generator()(model.config.num_hidden_layers, 1, model.config.num_attention_heads, scale=0.05)
    return model, EncodedExamples(examples, tokenizer, model), start


def make(device: torch.device) -> Problem:
    model, data, start = demo_model()
    model.to(device)
    data.device, data.correct, data.wrong = device, data.correct.to(device), data.wrong.to(device)

    def exact() -> tuple[Tensor, ...]:
        return Plain(copy.deepcopy(model).double(), data, start, torch.float64)()

    given = (model, data, start, torch.float32)
    variants = [
        Variant("eager", Plain(*given)),
        Variant("eager, directions in one batch", Plain(*given, stacked=True)),
    ]
    for backend in kernel_backends(device):
        variants.append(Variant(f"actscale_fast {backend}", Ours(*given), backend))
    batch, times = data.batch(range(len(data))), len(OBJECTIVE.directions)
    variants.append(Variant("matrix products alone", products(model, batch, times), checked=False))
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name)
    tokens = times * batch.input_ids.numel()
    return Problem(variants, exact, n_bytes=2 * 4 * weights, flops=4 * weights * tokens)


def case() -> Case:
    setting = Setting("SmolLM2-135M, 16 prompts, 2 directions", make, quick=True)
    return Case("step", "One step of a fit on the demo model", [setting], unit="s", bandwidth=False)
