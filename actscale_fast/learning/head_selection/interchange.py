"""Head interchange gates: few heads that change the answer when another prompt's run gives them.

The masks over a model's components of arXiv 2407.03779 and 2512.10903, for heads:

    h ← (1 − m)·h + m·h_source,  0 ≤ m ≤ 1        loss: mean max(0, margin − (log p(c) − log p(w))) + λ·Σ m

Each example has a source, and its correct answer is the one that the interchange should give. The gates start at 0;
Adam with a proximal step makes most of them exactly 0, and the result is clipped to [0, 1] after each step.

Our reading: the papers' masks are sampled, or hardened, and cover other components too; here they are real numbers with
the ℓ1 norm as the pressure to be few, as everywhere in this package. Prompt and source are paired at listed positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ... import ops
from ..._checks import check_counts, check_finite
from ...frozen.stored_activations import source_activations
from ...interventions import HeadInterchange
from ...tasks.examples import sources_of
from .subject import AnswerPasses, Scored, Subject, batches


def by_interchange(
    subject: Subject,
    *,
    positions: Iterable[int] = (-1,),
    steps: int = 60,
    lr: float = 0.05,
    sparsity: float = 0.01,
    margin: float = 1.0,
    fit_batch_size: int = 16,
) -> Scored:
    """Scores by the learned gates; see the module. Heads with a gate of 0 are not chosen.

    Args:
        subject: the model and the examples, each of which has a source.
        positions: the tokens that are exchanged; range(-T, 0) for prompts and sources of T aligned tokens.
        steps: updates.
        lr: Adam's learning rate.
        sparsity: λ.
        margin: the difference of the answers' log-probabilities that is asked for.
        fit_batch_size: prompts per update.
    """
    from tqdm.auto import tqdm

    check_counts(steps=steps, fit_batch_size=fit_batch_size)
    check_finite(lr=lr, margin=margin, sparsity=sparsity)
    if sparsity < 0:
        raise ValueError(f"sparsity: got {sparsity}, expected a number >= 0")
    subject.require_equal_heads("interchange")
    layers = subject.scalars.location.layers
    exchange = HeadInterchange.for_model(subject.model, layers=layers, positions=positions)
    texts = sources_of(subject.data.examples)
    sources = source_activations(
        subject.model, subject.tokenizer, exchange, texts, batch_size=subject.batch_size, progress=subject.progress
    )
    gates = exchange.gates
    moments = torch.zeros_like(gates), torch.zeros_like(gates)
    taken = torch.zeros((), dtype=torch.float32, device=gates.device)
    steps_of = tqdm(
        batches(subject, steps, fit_batch_size), total=steps, desc="gates", disable=not subject.progress, leave=False
    )
    with torch.enable_grad(), AnswerPasses(subject, exchange) as passes:
        for kinds in steps_of:
            n = sum(map(len, kinds))
            gradient = torch.zeros_like(gates)
            for rows in kinds:
                times = 2 if rows[0] in subject.data.long_answers else 1  # one row per answer
                with exchange.interchange(sources[torch.tensor(rows * times, device=sources.device)]):
                    logp = passes.log_probabilities(rows)
                loss = (margin - (logp[:, 0] - logp[:, 1])).clamp(min=0).sum() / n
                gradient += torch.autograd.grad(loss, gates)[0]
            with torch.no_grad():
                ops.proximal_adam_(gates.data, gradient, *moments, taken, lr=lr, betas=(0.9, 0.99), l1=sparsity)
                gates.clamp_(0.0, 1.0)
    scores = gates.detach()[:, 0].float().cpu()
    return Scored(scores, (scores > 0).float(), {"positions": list(exchange.location.positions or ())})
