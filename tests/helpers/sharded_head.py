"""The losses and logits of output heads, whole in one process or divided by rows among several."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from actscale_fast.architectures.lm_head import OutputHead
from actscale_fast.ops.losses.vocabulary_shard import VocabularyShard

N, D = 6, 8
#: (tokens, whether there is a bias, soft-cap): parts of equal and of unequal size; of 3 tokens, the second of two
#: processes has a single one.
KINDS = ((26, False, None), (27, True, None), (27, False, 5.0), (3, True, None), (3, False, 5.0))


def head_of(vocab: int, bias: bool, softcap: float | None, dtype: torch.dtype) -> OutputHead:
    """A random head; where there are several processes, the rows of this one."""
    generator = torch.Generator().manual_seed(vocab)
    weight = torch.randn(vocab, D, generator=generator).to(dtype)
    offset = (3 * torch.randn(vocab, generator=generator)).to(dtype) if bias else None
    shard = None
    if torch.distributed.is_initialized():
        shard = VocabularyShard(None, torch.distributed.get_rank(), torch.distributed.get_world_size(), vocab)
        rows = slice(shard.offset, shard.offset + shard.count)
        weight, offset = weight[rows].clone(), None if offset is None else offset[rows].clone()
    return OutputHead(nn.Identity(), weight, offset, 0.7, softcap, shard)


def losses_of(head: OutputHead, vocab: int, exclude: bool, kl: str, dtype: torch.dtype) -> dict[str, Any]:
    """The losses, their gradients, the loss of the frozen rows themselves, and the logits."""
    generator = torch.Generator().manual_seed(1)
    frozen = torch.randn(N, D, generator=generator).to(dtype)
    hidden = (frozen + 0.5 * torch.randn(N, D, generator=generator).to(dtype)).requires_grad_()
    correct = torch.randint(vocab, (N,), generator=generator)
    wrong = (correct + 1 + torch.randint(vocab - 1, (N,), generator=generator)) % vocab  # another token
    direction = torch.tensor([1.0, -1.0] * (N // 2))
    given: dict[str, Any] = {"exclude_answers": exclude, "kl": kl}
    reference = head.reference_statistics(frozen, correct, wrong, **given)
    losses = head.intervention_loss(hidden, reference[:], correct, wrong, direction=direction, margin=2.0, **given)
    upstream = torch.linspace(0.5, 2.0, N).to(losses[0].dtype)
    gradients = [torch.autograd.grad((upstream * loss).sum(), hidden, retain_graph=True)[0] for loss in losses]
    same = head.intervention_loss(frozen, reference, correct, wrong, direction=direction, **given)[1]
    ids = torch.stack([correct, wrong, correct], 1)
    logits, chosen = head.logits(hidden), head.chosen(hidden, ids)
    slopes = [torch.autograd.grad((value * value).sum(), hidden)[0] for value in (logits, chosen)]
    return {
        "losses": list(losses), "gradients": gradients, "of itself": float(same.abs().max()), "logits": logits,
        "chosen": chosen, "slopes": slopes,
    }  # fmt: skip


def heads(model: Any = None) -> dict[str, Any]:
    """`losses_of` heads of every kind."""
    found = {}
    for (vocab, bias, softcap), exclude, kl in itertools.product(KINDS, (True, False), ("forward", "reverse")):
        dtype = torch.float64 if vocab == 3 else torch.float32
        head = head_of(vocab, bias, softcap, dtype)
        found[f"{vocab} {bias} {softcap} {exclude} {kl}"] = losses_of(head, vocab, exclude, kl, dtype)
    return found
