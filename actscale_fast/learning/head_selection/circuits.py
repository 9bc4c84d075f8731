"""Circuits of heads: the logit difference when only some heads act, all others being ablated."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ...architectures.layout import layout
from ...frozen.encoder import TextEncoder
from ...frozen.stored_activations import activations_at
from ...interventions import ActivScalar, HeadInterchange
from ...tasks.examples import sources_of
from .subject import AnswerPasses, Subject

#: What replaces a head outside the circuit: nothing, or its activation at the same token of the example's source.
Ablation = Literal["zero", "interchange"]


def check_ablation(ablation: str) -> None:
    """Raise a ValueError for an ablation that there is not."""
    if ablation not in get_args(Ablation):
        raise ValueError(f"ablation: got {ablation!r}, expected 'zero' or 'interchange'")


@torch.no_grad()
def circuit_differences(subject: Subject, kept: Tensor, ablation: Ablation) -> Tensor:
    """log p(correct) − log p(wrong) of each prompt under each circuit, fp64 [G, N]; kept [G, L, H] is 1 at its heads.

    Raises:
        ValueError: "interchange" with an example without a source, or with one of another number of tokens.
    """
    location, device = subject.scalars.location, subject.scalars.device
    made: ActivScalar | HeadInterchange
    sources: Tensor | None = None
    if ablation == "zero":
        made = ActivScalar(location, n_groups=len(kept), device=device)
        made.alpha.copy_((kept - 1)[:, :, None])
    else:
        subject.require_equal_heads("interchange")
        longest = max(map(len, subject.data.prompts))
        found = layout(subject.model, location.paths)
        where = found.location("head", location.layers, tuple(range(-longest, 0)), paths=location.paths)
        made = HeadInterchange(where, n_groups=len(kept), device=device)
        made.gates.copy_((1 - kept)[:, :, None])
        sources = _aligned_sources(subject, made)
    differences = torch.zeros(len(kept), len(subject.data), dtype=torch.float64, device="cpu")
    with AnswerPasses(subject, made) as passes:
        for some in subject.data.by_length(subject.batch_size):
            for rows in subject.data.by_kind(some):
                if sources is None:
                    logp = passes.log_probabilities(rows)
                else:
                    assert isinstance(made, HeadInterchange)
                    times = len(kept) * (2 if rows[0] in subject.data.long_answers else 1)
                    with made.interchange(sources[torch.tensor(rows * times, device=sources.device)]):
                        logp = passes.log_probabilities(rows)  # [G, B, 2]
                differences[:, rows] = (logp[..., 0] - logp[..., 1]).double().cpu()
    return differences


def _aligned_sources(subject: Subject, made: HeadInterchange) -> Tensor:
    """The sources' activations at every token, each of which has a partner in the prompt."""
    texts = sources_of(subject.data.examples)
    encoder = TextEncoder(layout(subject.model, made.paths), subject.tokenizer)
    for row, (prompt, text) in enumerate(zip(subject.data.prompts, texts, strict=True), 1):
        source = encoder.prompt(text, f"row {row} of examples, source")
        if len(prompt) != len(source):
            raise ValueError(
                f"row {row} of examples: the prompt has {len(prompt)} tokens and its source {len(source)}, but an "
                "interchange of all tokens needs the same number"
            )
    return activations_at(
        subject.model, subject.tokenizer, made.location, texts, batch_size=subject.batch_size, progress=False,
        absent="zero",
    )  # fmt: skip
