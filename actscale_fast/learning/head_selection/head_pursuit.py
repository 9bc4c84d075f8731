"""Head Pursuit: heads whose outputs the unembedding rows of a concept's tokens explain (arXiv 2510.21518).

For each head, simultaneous orthogonal matching pursuit approximates what the head adds to the residual stream in all
prompts, H [N, d], by few rows of the unembedding, restricted to the concept's tokens. A head's score is the share of
‖H‖² that is explained.

    repeat:  choose the row e (of norm 1) with the largest Σ_n |⟨r_n, e⟩|;  project H on all rows chosen so far

Our reading: activations at the prompts' last tokens; rows of norm 1, without the final norm's scale; H is not centred;
the concept is by default the set of the examples' correct answers (the first token of each).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import check_counts
from ...architectures.layout import layout
from ...frozen.encoder import TextEncoder
from .contrast import contributions, last_tokens
from .subject import AnswerPasses, Scored, Subject

#: Rows of the unembedding that approximate a head's outputs, at most.
N_ATOMS = 10


def by_pursuit(subject: Subject, *, concept: Sequence[str] | None = None, n_atoms: int = N_ATOMS) -> Scored:
    """Scores by the share of a head's output that a concept explains; see the module.

    Args:
        subject: the model and the examples.
        concept: words, each with its leading space if it has one; all of their tokens count. None: the first tokens of
            the correct answers.
        n_atoms: the largest number of rows that approximate a head.

    Raises:
        ValueError: the model's output head is not a known matrix.
    """
    subject.require_equal_heads("head-pursuit")
    check_counts(n_atoms=n_atoms)
    with AnswerPasses(subject, subject.scalars) as passes:
        head = passes.head
    if head is None:
        subject.refuse_sharded_weights("head-pursuit")
        raise ValueError("method: 'head-pursuit' needs the model's output head, whose formula is not known")
    if concept is None:
        ids = sorted(set(subject.data.correct.tolist()))
    else:
        encoder = TextEncoder(layout(subject.model, subject.scalars.paths), subject.tokenizer)
        ids = sorted({token for word in concept for token in encoder.plain(word, "concept")})
        if not ids:
            raise ValueError("concept: got no tokens, expected at least one word")
    rows = head.rows(torch.tensor(ids, device=head.weight.device)).double()
    atoms = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)  # [M, d]
    heads = last_tokens(subject, subject.data.prompts, "head")  # [L, N, H, D]
    scores = []
    for index, number in enumerate(subject.scalars.location.layers):
        added = contributions(subject, number, heads[index]).double().transpose(0, 1)  # [H, N, d]
        scores.append(explained(added, atoms.to(added.device), n_atoms).cpu())
    return Scored(torch.stack(scores).float(), torch.ones(subject.shape, device="cpu"), {"n_concept_tokens": len(ids)})


def explained(signals: Tensor, atoms: Tensor, n_atoms: int) -> Tensor:
    """The share of each head's signals [H, N, d] that at most n_atoms of the atoms [M, d] explain, [H].

    All heads run together, each with its own atoms: an orthonormal basis [H, K, d] grows by one vector per round.
    """
    energy = signals.square().sum((1, 2))
    residual, basis = signals.clone(), signals.new_zeros(len(signals), 0, signals.shape[-1])
    for _ in range(min(n_atoms, len(atoms))):
        fits = (residual @ atoms.T).abs().sum(1)  # [H, M]
        new = atoms[fits.argmax(-1)]  # [H, d]
        for _ in range(2):  # twice is enough for orthogonality
            new = new - torch.einsum("hkd,hk->hd", basis, torch.einsum("hkd,hd->hk", basis, new))
        size = new.norm(dim=-1, keepdim=True)
        new = torch.where(size > 1e-9, new / size.clamp(min=1e-30), 0.0)  # nothing is left to explain
        basis = torch.cat([basis, new[:, None]], 1)
        residual = residual - torch.einsum("hnd,hd->hn", residual, new)[..., None] * new[:, None]
    return torch.where(energy > 0, 1 - residual.square().sum((1, 2)) / energy.clamp(min=1e-300), 0.0)
