"""SAMD and SAMI: heads whose contribution points along a concept, scaled by one number (arXiv 2506.17052).

The concept is a vector v in the residual stream: the mean over texts with the concept minus the mean over texts without
it. A head's score is the mean over the texts with the concept of cos(a, v), where a is what the head adds to the
residual stream. The k heads with the largest scores are scaled by s: α = s − 1.

Our reading: all activations are those of the last token; v is taken from the output of one layer in the middle of the
model; the texts are by default each example's prompt with its correct answer (with) and its wrong answer (without).
"""

from __future__ import annotations

import torch

from ...architectures.layout import layout
from .contrast import Texts, contributions, last_tokens, pairs_of
from .subject import Scored, Subject


def by_concept(
    subject: Subject, *, positive: Texts | None = None, negative: Texts | None = None, layer: int | None = None
) -> Scored:
    """Scores by the cosine with a concept; see the module.

    Args:
        subject: the model and the examples.
        positive, negative: texts with and without the concept; None: the examples' prompts with their answers.
        layer: the layer after which the concept is read; None: the middle one.
    """
    subject.require_equal_heads("sami")
    found = layout(subject.model, subject.scalars.paths)
    pairs = pairs_of(subject, positive, negative)
    at = [found.n_layers // 2 if layer is None else layer]
    means = [
        last_tokens(subject, texts, "residual", at)[0, :, 0].to(torch.float64).mean(0)
        for texts in (pairs.positive, pairs.negative)
    ]
    concept = means[0] - means[1]  # [d]
    heads = last_tokens(subject, pairs.positive, "head")  # [L, N, H, D]
    scores = []
    for index, number in enumerate(subject.scalars.location.layers):
        added = contributions(subject, number, heads[index]).double()  # [N, H, d]
        scores.append(torch.cosine_similarity(added, concept.to(added.device), dim=-1).mean(0).cpu())
    return Scored(torch.stack(scores).float(), torch.ones(subject.shape, device="cpu"), {"concept_layer": at[0]})
