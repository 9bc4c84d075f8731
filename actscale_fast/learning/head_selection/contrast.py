"""Last-token activations of contrastive texts: by default each prompt with its correct, and with its wrong answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...architectures.layout import layout
from ...architectures.sharding import is_dtensor, reshard
from ...frozen.chat import Messages
from ...frozen.encoder import TextEncoder, by_length
from ...frozen.reader import Reader
from .subject import Subject

Texts = Sequence[str | Messages]


class Pairs(NamedTuple):
    """The token ids of texts with a property, and of texts without it."""

    positive: list[list[int]]
    negative: list[list[int]]


def pairs_of(subject: Subject, positive: Texts | None, negative: Texts | None) -> Pairs:
    """The given texts, or by default the examples' prompts with either answer.

    Raises:
        TypeError, ValueError: only one of the two given, or texts that the model cannot take.
    """
    encoder = TextEncoder(layout(subject.model, subject.scalars.paths), subject.tokenizer)
    if (positive is None) != (negative is None):
        missing = "negative" if negative is None else "positive"
        raise ValueError(f"{missing}: got None, expected texts, because the other ones were given")
    if positive is not None and negative is not None:
        return Pairs(encoder.prompts(positive, "positive"), encoder.prompts(negative, "negative"))  # type: ignore[arg-type]
    data = subject.data
    both: tuple[list[list[int]], list[list[int]]] = ([], [])
    for row, prompt in enumerate(data.prompts):
        long = data.long_answers.get(row)
        answers = ([int(data.correct[row])], [int(data.wrong[row])]) if long is None else (long.correct, long.wrong)
        for texts, answer in zip(both, answers, strict=True):
            texts.append([*prompt, *answer])
            encoder.check_length(len(texts[-1]), f"row {row + 1} of examples: the prompt with its answer")
    return Pairs(*both)


def last_tokens(
    subject: Subject, texts: Sequence[Sequence[int]], site: str, layers: Sequence[int] | None = None
) -> Tensor:
    """The activation at the last token of each text, [L, N, H, D]; H = 1 at the site residual.

    Args:
        subject: the model.
        texts: token ids; batches hold texts of similar length.
        site, layers: as in `Reader`; None: the layers whose heads are scored.
    """
    location = subject.scalars.location
    layers = location.layers if layers is None else layers
    encoder = TextEncoder(layout(subject.model, location.paths), subject.tokenizer)
    parts, order = [], list[int]()
    with Reader(subject.model, site, layers, location.paths) as read:
        for rows in _batches(subject, texts):
            batch = encoder.batch([texts[row] for row in rows])
            parts.append(read(batch, reduce=lambda x: x[:, -1]))
            order += rows
    values = torch.cat(parts, 1)
    return values[:, torch.tensor(order, device=values.device).argsort()]


def _batches(subject: Subject, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    if subject.data.pads:
        yield from by_length(texts, subject.batch_size)
        return
    alike: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        alike.setdefault(len(text), []).append(row)
    for rows in alike.values():
        for start in range(0, len(rows), subject.batch_size):
            yield rows[start : start + subject.batch_size]


@torch.no_grad()
def contributions(subject: Subject, layer: int, heads: Tensor) -> Tensor:
    """What each head adds to the attention's output, its part of W_O times its activation: [N, H, d], in fp32 or wider.

    Where W_O is sharded over processes, it is gathered, which is a collective operation.

    Args:
        subject: the model.
        layer: number of the layer in the model.
        heads: its heads' activations [N, H, D].
    """
    found = layout(subject.model, subject.scalars.paths)
    projection = found.site_module("head", layer)
    n, n_heads, width = heads.shape
    reshard(found.model)
    weight: Any = getattr(projection, "weight", None)
    if is_dtensor(weight):
        whole = weight.detach().full_tensor()
        whole = whole.T if hasattr(projection, "in_features") else whole  # Conv1D keeps [in, out]
        wide = torch.promote_types(heads.dtype, torch.float32)
        return torch.einsum("nhk,hkd->nhd", heads.to(wide), whole.to(wide).unflatten(0, (n_heads, width)))
    alone = torch.zeros(n, n_heads, n_heads, width, dtype=heads.dtype, device=heads.device)
    index = torch.arange(n_heads, device=heads.device)
    alone[:, index, index] = heads
    added = projection(alone.flatten(2))
    offset = projection(torch.zeros(1, 1, n_heads * width, dtype=heads.dtype, device=heads.device))  # its bias
    return (added - offset).to(torch.promote_types(heads.dtype, torch.float32))
