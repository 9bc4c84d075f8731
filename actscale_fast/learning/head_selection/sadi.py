"""SADI: heads whose activation differs between contrastive texts, scaled at the last token (arXiv 2410.12299).

A head's score is the mean over pairs of the difference of its activation at the last token, with the correct answer
minus with the wrong one, averaged over the head's channels as in the released code. The k heads with the largest scores
are scaled at the prompt's last token: x + δ·x, hence α = δ (the code's factor is 1 + δ).

Our reading: tokens that are generated later are not scaled.
"""

from __future__ import annotations

import torch

from .contrast import Texts, last_tokens, pairs_of
from .subject import Scored, Subject


def by_difference(subject: Subject, *, positive: Texts | None = None, negative: Texts | None = None) -> Scored:
    """Scores by the mean difference of activations; see the module.

    Args:
        subject: the model and the examples.
        positive, negative: contrastive texts; None: the examples' prompts with their answers.
    """
    subject.require_equal_heads("sadi")
    pairs = pairs_of(subject, positive, negative)
    means = [
        last_tokens(subject, texts, "head").to(torch.float64).mean((1, 3)).cpu()  # [L, H]
        for texts in (pairs.positive, pairs.negative)
    ]
    return Scored((means[0] - means[1]).float(), torch.ones(subject.shape, device="cpu"))
