"""Stored activations: what an intervention takes from another run of the frozen model, its source."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .._checks import check_counts
from ..architectures.layout import layout
from ..architectures.location import Location
from ..interventions import Intervention, TakesSource
from .chat import Messages
from .encoder import TextEncoder, by_length, check_texts
from .reader import Reader

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
    """Read the activations that an intervention takes from these texts while the frozen model processes them.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer. Other patches on the model stay in
            force; that of `das` itself is paused.
        das: an interchange, such as a `BoundlessDAS` or a `HeadInterchange`, or a `RunTwice`. It gives the site, layers
            and positions; positions count in each text's own tokens.
        texts: the sources (of a `RunTwice` the prompts themselves), each a text or a list of chat messages. The
            tokenizer's closing token is left out, and a source that occurs twice is read once.
        batch_size: texts per forward pass.
        progress: show a progress bar.

    Returns:
        [N, L, P, H, D] in the model's dtype, on the device of the first chosen layer; pass it to `das.interchange`.

    Raises:
        TypeError: `das` takes no source, or a text is not a string.
        ValueError: no texts, or a text without tokens, longer than the model's context, with token ids that the model
            does not have, or without one of the positions (of a `RunTwice`: with more tokens than it has positions);
            the message names the text's row.
    """
    if not isinstance(das, Intervention) or not das.needs_source:
        raise TypeError(f"das: got {type(das).__name__}, expected a BoundlessDAS, a HeadInterchange or a RunTwice")
    own = type(das).source_activations is not Intervention.source_activations
    if own or not isinstance(das, TakesSource):
        return das.source_activations(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    was_paused, das.paused = das.paused, True
    try:
        return activations_at(
            model, tokenizer, das.location, texts, batch_size=batch_size, progress=progress,
            absent="zero" if das.source_is_prompt else "refuse",
        )  # fmt: skip
    finally:
        das.paused = was_paused


def activations_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    location: Location,
    texts: Sequence[str | Messages],
    *,
    batch_size: int,
    progress: bool,
    absent: Literal["refuse", "zero"] = "refuse",
) -> Tensor:
    """The activations at a location with positions, [N, L, P, H, D]; see `source_activations`.

    Args:
        absent: what to do with a position that a text does not have: refuse the text, or store 0; a text with tokens at
            none of the positions is then refused instead.
    """
    from tqdm.auto import tqdm

    check_counts(batch_size=batch_size)
    found = layout(model, location.paths)
    location.model.require(found.fingerprint)
    encoder = TextEncoder(found, tokenizer)
    prompts: list[tuple[int, ...]] = []
    places: dict[tuple[int, ...], list[int | None]] = {}
    for row, text in enumerate(check_texts(texts, "texts"), 1):
        prompts.append(tuple(encoder.prompt(text, f"row {row} of texts")))
        places[prompts[-1]] = _places(location.positions or (), len(prompts[-1]), row, absent)
    distinct = list(places)
    batches = list(by_length(distinct, batch_size))
    parts = []
    with Reader(model, location.site, location.layers, location.paths) as read:
        for rows in tqdm(batches, desc="sources", disable=not progress, leave=False):
            group = [distinct[row] for row in rows]
            batch = encoder.batch(group)
            n_columns = batch.input_ids.shape[1]
            found_at = [[-1 if place is None else n_columns + place for place in places[ids]] for ids in group]
            columns = torch.tensor(found_at, device="cpu")
            parts.append(read(batch, reduce=functools.partial(_gathered, columns=columns)).transpose(0, 1))
    values = torch.cat(parts)
    row_of = {distinct[row]: place for place, row in enumerate(row for rows in batches for row in rows)}
    return values[torch.tensor([row_of[ids] for ids in prompts], device=values.device)]


def _places(positions: Sequence[int], length: int, row: int, absent: str) -> list[int | None]:
    """The positions counted from the end, −1 being the last token; None: the text has no such position."""
    if absent == "zero" and length > -min(positions, default=0):
        raise ValueError(
            f"row {row} of texts: the prompt has {length} tokens, but the intervention has positions for the last "
            f"{-min(positions, default=0)}; make it for longer prompts"
        )
    found: list[int | None] = []
    for position in positions:
        is_there = -length <= position < length
        if not is_there and absent == "refuse":
            raise ValueError(f"row {row} of texts: the source has {length} tokens, and so no position {position}")
        found.append((position if position < 0 else position - length) if is_there else None)
    return found


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, T, H, D] at columns [B, P] -> [B, P, H, D]; 0 at the column −1."""
    index = columns.to(x.device)[:, :, None, None]
    taken = x.gather(1, index.clamp(min=0).expand(-1, -1, *x.shape[2:]))
    return torch.where(index >= 0, taken, 0)
