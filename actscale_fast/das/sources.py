"""The activations that an interchange takes from other prompts, its sources."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_counts
from ..architectures.layout import layout
from ..architectures.location import Location
from ..frozen.chat import Messages
from ..frozen.encoder import TextEncoder, by_length, check_texts
from ..frozen.reader import Reader
from ..interventions import Intervention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def source_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    das: Intervention,
    texts: Sequence[str | Messages],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Read the activations at an interchange's location while the frozen model processes these texts.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer. Other patches on the model stay in
            force; that of `das` itself is paused.
        das: gives the site, layers and positions; positions count in each text's own tokens.
        texts: the sources, each a text or a list of chat messages. The tokenizer's closing token is left out, and a
            source that occurs twice is read once.
        batch_size: texts per forward pass.
        progress: show a progress bar.

    Returns:
        [N, L, P, H, D] in the model's dtype, on the device of the first chosen layer; pass it to `das.interchange`.

    Raises:
        TypeError: `das` takes no source, or a text is not a string.
        ValueError: no texts, or a text without tokens, longer than the model's context, with token ids that the model
            does not have, or without one of the positions; the message names the text's row.
    """
    if not isinstance(das, Intervention) or not das.needs_source:
        raise TypeError(f"das: got {type(das).__name__}, expected a BoundlessDAS")
    return das.source_activations(model, tokenizer, texts, batch_size=batch_size, progress=progress)


def activations_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    location: Location,
    texts: Sequence[str | Messages],
    *,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """The activations at a location with positions, [N, L, P, H, D]; see `source_activations`."""
    from tqdm.auto import tqdm

    check_counts(batch_size=batch_size)
    found = layout(model, location.paths)
    location.model.require(found.fingerprint)
    encoder = TextEncoder(found, tokenizer)
    prompts: list[tuple[int, ...]] = []
    places: dict[tuple[int, ...], list[int]] = {}
    for row, text in enumerate(check_texts(texts, "texts"), 1):
        prompts.append(tuple(encoder.prompt(text, f"row {row} of texts")))
        places[prompts[-1]] = _places(location.positions or (), len(prompts[-1]), row)
    distinct = list(places)
    batches = list(by_length(distinct, batch_size))
    parts = []
    with Reader(model, location.site, location.layers, location.paths) as read:
        for rows in tqdm(batches, desc="sources", disable=not progress, leave=False):
            group = [distinct[row] for row in rows]
            batch = encoder.batch(group)
            n_columns = batch.input_ids.shape[1]
            columns = torch.tensor([[n_columns + place for place in places[ids]] for ids in group], device="cpu")
            parts.append(read(batch, reduce=functools.partial(_gathered, columns=columns)).transpose(0, 1))
    values = torch.cat(parts)
    row_of = {distinct[row]: place for place, row in enumerate(row for rows in batches for row in rows)}
    return values[torch.tensor([row_of[ids] for ids in prompts], device=values.device)]


def _places(positions: Sequence[int], length: int, row: int) -> list[int]:
    """The positions counted from the end; −1 is the last token."""
    for position in positions:
        if not -length <= position < length:
            raise ValueError(f"row {row} of texts: the source has {length} tokens, and so no position {position}")
    return [position if position < 0 else position - length for position in positions]


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, T, H, D] at columns [B, P] -> [B, P, H, D]."""
    index = columns.to(x.device)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
