"""The activations that interchange interventions take from other prompts, the sources."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.layout import embedding_weight, layout
from ..frozen.batching import left_padded, open_ids, pad_id_of
from ..frozen.reader import Reader
from ..interventions import Intervention
from ..tasks.examples import Example
from .boundless_das import BoundlessDAS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def source_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    das: BoundlessDAS,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """What stands at the places of an interchange while the frozen model reads these texts.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer. Patches of it are part of it, but
            for that of `das` itself.
        das: names site, layers and positions, which count in each text's own tokens.
        texts: the sources, each without the tokens that close a text. One that comes again is read once.
        batch_size: texts in a pass.
        progress: show a progress bar.

    Returns:
        [N, L, P, H, D] in the model's dtype, on the device of the first chosen layer; for `das.interchange`.

    Raises:
        TypeError: `das` is no BoundlessDAS, a text is no string.
        ValueError: no texts, or one without tokens, longer than the model's context, with tokens that the model does
            not have, or without one of the positions; each names the text.
    """
    from tqdm.auto import tqdm

    if not isinstance(das, BoundlessDAS):
        raise TypeError(f"das: got {type(das).__name__}, expected a BoundlessDAS")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, expected a positive integer")
    location = das.location
    found = layout(model, location.paths)
    location.model.require(found.fingerprint)
    embedding: Tensor = embedding_weight(found.model)
    prompts: dict[str, list[int]] = {}
    places: dict[str, list[int]] = {}
    if isinstance(texts, str):
        raise TypeError("texts: got a str, expected a list of strings")
    for row, text in enumerate(texts):
        if isinstance(text, str) and text in prompts:
            continue
        prompts[text] = _checked_ids(tokenizer, text, row, found.max_context, embedding.shape[0])
        places[text] = _places(location.positions or (), len(prompts[text]), row)
    if not prompts:
        raise ValueError("texts: got none, expected at least one source")
    order = sorted(prompts, key=lambda text: len(prompts[text]))
    parts = []
    was_paused, das.paused = das.paused, True
    try:
        with Reader(model, location.site, location.layers, location.paths) as read:
            for start in tqdm(range(0, len(order), batch_size), desc="sources", disable=not progress, leave=False):
                group = order[start : start + batch_size]
                batch = left_padded([prompts[text] for text in group], pad_id_of(tokenizer), embedding.device)
                n_columns = batch.input_ids.shape[1]
                columns = torch.tensor(
                    [[n_columns + place for place in places[text]] for text in group], device="cpu"
                )  # [B, P]
                parts.append(read(batch, reduce=functools.partial(_gathered, columns=columns)).transpose(0, 1))
    finally:
        das.paused = was_paused
    values = torch.cat(parts)
    row_of = {text: row for row, text in enumerate(order)}
    return values[torch.tensor([row_of[text] for text in texts], device=values.device)]


def interchanges_of(intervention: Intervention) -> list[BoundlessDAS]:
    """The interchanges among an intervention and its parts."""
    return [part for part in intervention.modules() if isinstance(part, BoundlessDAS)]


def source_texts(examples: Sequence[Example]) -> list[str]:
    """The source of every example; ValueError names the first row without one."""
    for row, example in enumerate(examples):
        if example.source is None:
            raise ValueError(f"examples: row {row} has no source, which an interchange takes the activations from")
    return [example.source for example in examples if example.source is not None]


def _checked_ids(
    tokenizer: PreTrainedTokenizerBase, text: object, row: int, context: int | None, n_known: int
) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"texts: row {row} is a {type(text).__name__}, expected a string")
    ids = open_ids(tokenizer, text)
    if not ids:
        raise ValueError(f"texts: row {row}: the source {text!r} has no tokens")
    if context is not None and len(ids) > context:
        raise ValueError(f"texts: row {row} has {len(ids)} tokens, expected at most the model's {context}")
    if max(ids) >= n_known:
        raise ValueError(f"texts: row {row}: the source has token id {max(ids)}, expected less than {n_known}")
    return ids


def _places(positions: Sequence[int], length: int, row: int) -> list[int]:
    """The positions counted from the end, −1 the last token."""
    for position in positions:
        if not -length <= position < length:
            raise ValueError(f"texts: row {row}: the source has {length} tokens, and so no position {position}")
    return [position if position < 0 else position - length for position in positions]


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, T, H, D] at columns [B, P] -> [B, P, H, D]."""
    index = columns.to(x.device)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
